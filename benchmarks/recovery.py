"""Seconds from a fault to the next committed step, and the same kill on the peers.

python -m benchmarks.recovery [--quick]

Three workers, one torch thread each, ``benchmarks.workload``'s model and data, a version every 25 steps everywhere.
Recovered means: the first step of the group that the fault led to is committed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import shoal
from benchmarks.machine import finish, median_and_spread
from benchmarks.peers.runner import PeerResult, measure
from benchmarks.trials import Trial, trial
from benchmarks.workload import Workload
from shoal.testing import Fault, FaultPlan

JOB = Path(__file__).parent / "recovery_job.py"
WORKERS = 3
FIRST_STEP = 40
AROUND_S = 2.0
AFTER_S = 0.5
QUICK_PEER = "torchft"


def plan_of(times: int, apart: int) -> FaultPlan:
    """Each fault ``times`` times, the workers in turn, ``apart`` steps from one to the next: by then all is healed."""
    kinds = [kind for kind in ("kill", "freeze", "kill_coordinator") for _ in range(times)]
    plan = FaultPlan()
    for number, kind in enumerate(kinds):
        plan = plan.add(Fault(kind, FIRST_STEP + number * apart, 1 + number % 2))  # type: ignore[arg-type]
    for number in range(2 * times):
        step = FIRST_STEP + (len(kinds) + number) * apart
        plan = plan.scale(WORKERS + 1 - number % 2, at_step=step)
    return plan


def run_ours(times: int, apart: int, folder: Path) -> Trial:
    """One run that meets all of it."""
    plan = plan_of(times, apart)
    work = Workload(num_steps=plan.faults[-1].at_step + apart)
    work.write_data(folder)
    env = {"RECOVERY_DATA": folder, "RECOVERY_STEPS": work.num_steps}
    return trial("recovery", JOB, plan, workers=WORKERS, folder=folder / "runs", **env)


def seconds_of(done: Trial) -> dict[str, list[float]]:
    """Every trial's seconds, by the fault's name."""
    by_kind = {
        kind: [h for h in done.inflicted if h.fault.kind == kind] for kind in ("kill", "freeze", "kill_coordinator")
    }
    return {
        "kill_s": [done.resumed_after(hit) for hit in by_kind["kill"]],
        "freeze_s": [done.resumed_after(hit) for hit in by_kind["freeze"]],
        "coordinator_s": [done.longest_gap(h.at_s, h.at_s + AROUND_S) for h in by_kind["kill_coordinator"]],
        "join_stall_s": join_stalls(done),
        "step_s": [step_s(done)],
    }


def join_stalls(done: Trial) -> list[float]:
    """The longest time without a commit from each newcomer's coming until it has caught up, and a little after."""
    stalls = []
    for hit in done.inflicted:
        if hit.worker == f"{WORKERS + 1} workers":
            healed_s = next(e["at_s"] for e in done.run.events if e["kind"] == "healed" and e["at_s"] > hit.at_s)
            stalls.append(done.longest_gap(hit.at_s, healed_s + AFTER_S))
    return stalls


def step_s(done: Trial) -> float:
    """The median time between two commits."""
    times = [at_s for at_s, _ in done.commits]
    return statistics.median(b - a for a, b in pairwise(times))


def measure_peers(quick: bool) -> list[PeerResult]:
    """The same kill on the peers; with ``quick`` only once, on the one that was the best."""
    if quick:
        return [measure(QUICK_PEER, 1, workload=Workload(num_steps=75))]
    return [measure("torchft", 5), measure("torchrun", 3), measure("ray_train", 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-peers", action="store_true", help="Leave the peers out.")
    options = parser.parse_args()
    times, apart = (2, 26) if options.quick else (7, 60)
    with tempfile.TemporaryDirectory() as folder:
        done = run_ours(times, apart, Path(folder))
        seconds, account = seconds_of(done), shoal.account(done.run)
    for name, values in seconds.items():
        print(f"{name:15} " + " ".join(f"{value:.3f}" for value in values))
    figures: dict[str, Any] = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    figures |= {"samples_lost": account.lost, "samples_repeated": account.repeated}
    peers = [] if options.no_peers else measure_peers(options.quick)
    figures |= figures_of(peers, figures["kill_s"])
    spread = {name: median_and_spread(values) for name, values in seconds.items()}
    config = {"workers": WORKERS, "quick": options.quick, "spread": spread, "peers": [asdict(peer) for peer in peers]}
    finish("recovery", figures, config)


def figures_of(peers: list[PeerResult], kill_s: float) -> dict[str, Any]:
    """The peers' medians, and the best of them beside ours."""
    figures: dict[str, Any] = {}
    for peer in peers:
        figures[f"{peer.peer}_s"] = round(statistics.median(peer.recovery_s), 3)
        figures[f"{peer.peer}_caught_up_s"] = round(statistics.median(peer.caught_up_s), 3)
        figures[f"{peer.peer}_samples_lost"] = max(peer.samples_lost)
        figures[f"{peer.peer}_lost_steps"] = max(peer.lost_steps)
        print(f"{peer.peer:15} " + " ".join(f"{value:.3f}" for value in peer.recovery_s), peer.note)
    if peers:
        best = min(peers, key=lambda peer: statistics.median(peer.recovery_s))
        figures |= {"peer": best.peer, "peer_best_s": figures[f"{best.peer}_s"]}
        figures["times_shorter_than_peer"] = round(figures["peer_best_s"] / kill_s, 2)
    return figures


if __name__ == "__main__":
    main()
