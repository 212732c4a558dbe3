"""Seconds from a fault to the next committed step, and the same kill on the peers.

python -m benchmarks.recovery [--quick]

Three workers, one torch thread each, ``benchmarks.workload``'s model and data, a version every 25 steps everywhere.
Recovered means: the first step of the group that the fault led to is committed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
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
APART, FIRST = 60, 40
AROUND_S = 2.0


def plan_of(kind: str, times: int) -> FaultPlan:
    """The fault again and again, the workers in turn, each time after the last one's replacement is in."""
    plan = FaultPlan()
    for number in range(times):
        plan = plan.add(Fault(kind, FIRST + number * APART, 1 + number % 2))  # type: ignore[arg-type]
    return plan


def joins(times: int) -> FaultPlan:
    """One worker joins, later one leaves, again and again."""
    plan = FaultPlan()
    for number in range(times):
        plan = plan.scale(WORKERS + 1, at_step=FIRST + 2 * number * APART)
        plan = plan.scale(WORKERS, at_step=FIRST + (2 * number + 1) * APART)
    return plan


def ours(plan: FaultPlan, name: str, folder: Path) -> Trial:
    """A run under the plan, long enough for all of it."""
    steps = FIRST + len(plan.faults) * APART + APART
    work = Workload(num_steps=steps)
    data = folder / f"data-{steps}"
    if not data.exists():
        data.mkdir()
        work.write_data(data)
    return trial(name, JOB, plan, workers=WORKERS, folder=folder / "runs", RECOVERY_DATA=data, RECOVERY_STEPS=steps)


def join_stalls(done: Trial) -> list[float]:
    """The longest time without a commit from each newcomer's coming until it has caught up, and a little after."""
    stalls = []
    events = done.run.events
    for hit in done.inflicted:
        if hit.worker == f"{WORKERS + 1} workers":
            healed_s = next(e["at_s"] for e in events if e["kind"] == "healed" and e["at_s"] > hit.at_s)
            stalls.append(done.longest_gap(hit.at_s, healed_s + AROUND_S / 4))
    return stalls


def measure_ours(times: int, folder: Path) -> dict[str, list[float]]:
    """Every trial's seconds by the fault's name."""
    kills = ours(plan_of("kill", times), "kill", folder)
    freezes = ours(plan_of("freeze", times), "freeze", folder)
    coordinators = ours(plan_of("kill_coordinator", times), "coordinator", folder)
    joined = ours(joins(times), "join", folder)
    lost = [samples_off(done) for done in (kills, freezes, coordinators, joined)]
    return {
        "kill_s": [kills.resumed_after(hit) for hit in kills.inflicted],
        "freeze_s": [freezes.resumed_after(hit) for hit in freezes.inflicted],
        "coordinator_s": [coordinators.longest_gap(h.at_s, h.at_s + AROUND_S) for h in coordinators.inflicted],
        "join_stall_s": join_stalls(joined),
        "samples_off": lost,
        "step_s": [step_s(kills)],
    }


def step_s(done: Trial) -> float:
    """The median time between two commits."""
    times = [at_s for at_s, _ in done.commits]
    return statistics.median(b - a for a, b in pairwise(times))


def samples_off(done: Trial) -> int:
    """Samples committed other than once, by the account in the last version."""
    found = shoal.account(done.run)
    return found.lost + found.repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-peers", action="store_true", help="Leave the peers out.")
    options = parser.parse_args()
    times = 2 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure_ours(times, Path(folder))
    for name, values in seconds.items():
        print(f"{name:15} " + " ".join(f"{value:.3f}" for value in values))
    names = [] if options.no_peers else ["torchrun"] if options.quick else ["torchrun", "ray_train", "torchft"]
    peers = [measure(name, 1 if options.quick else 5) for name in names]
    figures = figures_of(seconds, peers)
    spread = {name: median_and_spread(values) for name, values in seconds.items() if values}
    finish("recovery", figures, {"workers": WORKERS, "quick": options.quick, "spread": spread})


def figures_of(seconds: dict[str, list[float]], peers: list[PeerResult]) -> dict[str, Any]:
    """The medians, and the best of the peers beside them."""
    figures: dict[str, Any] = {
        name: round(statistics.median(seconds[name]), 3)
        for name in ("kill_s", "freeze_s", "coordinator_s", "join_stall_s")
    }
    figures |= {"samples_lost": int(sum(seconds["samples_off"])), "samples_repeated": int(sum(seconds["samples_off"]))}
    figures["step_s"] = round(seconds["step_s"][0], 4)
    for peer in peers:
        figures[f"{peer.peer}_s"] = round(statistics.median(peer.caught_up_s), 3)
        figures[f"{peer.peer}_samples_lost"] = max(peer.samples_lost)
        figures[f"{peer.peer}_samples_repeated"] = max(peer.samples_repeated)
        print(f"{peer.peer:15} " + " ".join(f"{value:.3f}" for value in peer.caught_up_s), peer.note)
    if peers:
        best = min(peers, key=lambda peer: statistics.median(peer.caught_up_s))
        figures["peer"], figures["peer_best_s"] = best.peer, figures[f"{best.peer}_s"]
        figures["times_shorter_than_peer"] = round(figures["peer_best_s"] / figures["kill_s"], 1)
    return figures


if __name__ == "__main__":
    main()
