"""Fashion-MNIST to 0.88 on the test set, by 4 hosts that links of 100 Mbit/s join, one thread each.

Time counts from the first generation (DDP: its process group) to the first evaluation that reaches the target; starting
processes and evaluating are left out, for all alike. Batch, samples, initial parameters and the schedule's shape are
the same; DDP has the SGD that it needs the fewest steps with, and local steps have one of their own (torchft's and ours
the same). torchft deals the samples in an order of its own, and gets no codec: its own needs a GPU.

In the full run torch's DDP trains for real until it is there; what counts is that, or if it is less its measured step
time multiplied by the steps that it needs. With its best hook its time is always the latter, and with ``--quick`` so is
DDP's own: the steps are found by the same optimisation in one process without an exchange. ``--quick`` is of a schedule
of 336 steps, and to 0.85.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import accuracy_gpt, accuracy_torchft
from benchmarks.accuracy_job import GLOBAL_BATCH, LEARNING_RATE, MOMENTUM, SETTINGS, STEPS
from benchmarks.accuracy_runs import Benches, plain, spec
from benchmarks.accuracy_traces import Trace, draw, mean_gap_pp, table
from benchmarks.loops import Loops
from benchmarks.machine import RESULTS, finish, median_and_spread
from shoal.lab import Lab

TARGET = 0.88
LINK = "100mbit"
BEST = "diloco_16_int4_overlap"
"""Our best setting."""
TASK: Mapping[str, Any] = {
    "target": TARGET, "steps": STEPS, "global_batch": GLOBAL_BATCH,
    "learning_rate": LEARNING_RATE, "momentum": MOMENTUM,
}  # fmt: skip
OTHERS = tuple(name for name in SETTINGS if name not in (BEST, "allreduce_fp32"))
HOOKS = ("ddp", "ddp_fp16")
SEEDS = (0, 1, 2)
QUICK_TARGET, QUICK_STEPS, QUICK_EVERY_STEPS = 0.85, 336, 48
EVALUATE_FROM = STEPS // 2
"""DDP is not there before half of the schedule, and spares itself the evaluations."""


@dataclass(frozen=True)
class Wire:
    """What a peer's step costs at the link's rate."""

    step_s: float
    sent_bytes: float


def wires(lab: Lab, folder: Path, pairs: int, steps: int) -> dict[str, Wire]:
    """DDP's steps with and without its hook, in turns."""
    with Loops(lab, HOOKS, folder) as loops:
        times: dict[str, list[float]] = {name: [] for name in HOOKS}
        sent: dict[str, list[float]] = {name: [] for name in HOOKS}
        for name in HOOKS:  # a first step sends the parameters too
            loops.run(name, "step", 1)
        for pair in range(pairs):
            for name in HOOKS if pair % 2 == 0 else HOOKS[::-1]:
                before = sum(lab.bytes(host)[0] for host in lab.hosts)
                times[name] += loops.run(name, "step", steps)
                after = sum(lab.bytes(host)[0] for host in lab.hosts)
                sent[name].append((after - before) / len(lab.hosts) / steps)
    return {name: Wire(statistics.median(times[name]), statistics.mean(sent[name])) for name in HOOKS}


@dataclass(frozen=True)
class Findings:
    """What was measured. ``exact`` is DDP's optimisation by seed, and ``best`` our best setting's runs by seed."""

    wires: Mapping[str, Wire]
    exact: Sequence[Trace]
    best: Sequence[Trace]
    target: float = TARGET
    others: Sequence[Trace] = ()
    real: Sequence[Trace] = ()
    """Peers' runs for real."""

    def peer_s(self, name: str, seed: int) -> float | None:
        """A peer's seconds to the target: those of its run, or the steps that it needs at its step time, if that is
        less or it did not run."""
        needed = self.exact[seed].first_at(self.target)
        run = next((trace for trace in self.real if trace.name == name), None)
        there = run.first_at(self.target) if run is not None and seed == SEEDS[0] else None
        known = [] if needed is None else [needed.step * self.wires[name].step_s]
        known += [] if there is None else [there.at_s]
        return min(known, default=None)

    def speedups(self, name: str) -> list[float]:
        """A peer's seconds over ours, for the seeds with which both got there."""
        pairs = [(self.peer_s(name, seed), run.first_at(self.target)) for seed, run in enumerate(self.best)]
        return [theirs_s / ours.at_s for theirs_s, ours in pairs if theirs_s is not None and ours is not None]


def quick(folder: Path) -> Findings:
    """One seed and a short schedule; DDP's time by its step time and the steps that it needs. The lab takes one of two
    processors to begin with, and DDP's steps wait for the links: the plain loop has the other one meanwhile."""
    os.environ["ACCURACY_STEPS"] = str(QUICK_STEPS)
    os.environ["ACCURACY_EVALUATE_EVERY_STEPS"] = str(QUICK_EVERY_STEPS)
    print("DDP's time is its step time, measured now, times the steps that it needs without links, which are the same")
    with ThreadPoolExecutor(1) as pool:
        exact = pool.submit(plain, folder, evaluate_from=2 * QUICK_STEPS // 3)
        with Lab(spec(LINK)) as shaped:
            found = wires(shaped, folder / "loops", pairs=2, steps=1)
            say(exact.result(), QUICK_TARGET)
            best = say(Benches(shaped, shaped, folder).ours(BEST, until=QUICK_TARGET), QUICK_TARGET)
    return Findings(found, [exact.result()], [best], QUICK_TARGET)


def full(benches: Benches) -> Findings:
    """Several seeds, every setting, torchft's DiLoCo, and DDP for real."""
    best, exact = [], []
    for seed in SEEDS:
        best.append(say(benches.ours(BEST, seed=seed)))
        exact.append(say(benches.ours("allreduce_fp32", seed=seed, free=True)))
    others = [say(benches.ours(name)) for name in OTHERS]
    try:
        others.append(say(accuracy_torchft.run(benches)))
    except RuntimeError as error:
        print(f"torchft's DiLoCo is left out: {error}", flush=True)
    found = wires(benches.shaped, benches.folder / "loops", pairs=5, steps=2)
    real = [say(benches.ddp("none", until=TARGET, evaluate_from=EVALUATE_FROM))]
    return Findings(found, exact, best, TARGET, others, real)


def say(run: Trace, target: float = TARGET) -> Trace:
    """A line of progress."""
    there = run.first_at(target)
    when = f"{target} after {there.step} steps and {there.at_s:.1f} s" if there else f"{target} not reached"
    print(f"{run.name}: {when}; {run.last_accuracy:.4f} at the end, {1000 * run.step_s:.1f} ms a step", flush=True)
    return run


def figures_of(found: Findings) -> dict[str, Any]:
    """What the last line tells. Null: the target was not reached."""
    over = {name: statistics.median(found.speedups(name) or [0.0]) for name in HOOKS}
    ours = [*found.best[:1], *found.others]
    peers = {name: found.peer_s(name, 0) for name in HOOKS}
    return {
        "speedup_vs_ddp": round(over["ddp"], 2) or None,
        "speedup_vs_best_hook": round(min(over.values()), 2) or None,
        "accuracy_gap_pp": round(mean_gap_pp(found.exact, found.best), 3),
        "best_setting": BEST,
        "target": found.target,
        "seconds_to_target": {run.name: _seconds(run, found.target) for run in ours}
        | {name: None if at_s is None else round(at_s, 1) for name, at_s in peers.items()},
        "step_s": {run.name: round(run.step_s, 4) for run in ours}
        | {name: round(wire.step_s, 4) for name, wire in found.wires.items()},
        "sent_bytes_a_step": {run.name: round(run.sent_bytes) for run in ours}
        | {name: round(wire.sent_bytes) for name, wire in found.wires.items()},
        "seconds_measured_of": [run.name for run in (*ours, *found.real)],
    }


def _seconds(run: Trace, target: float) -> float | None:
    there = run.first_at(target)
    return None if there is None else round(there.at_s, 2)


def lines_of(found: Findings) -> list[Trace]:
    """The figure's lines: all that ran, and the peers' optimisation at their step times."""
    peers = [found.exact[0].at_step_time(found.wires[name].step_s, name) for name in HOOKS]
    return [*peers, found.best[0], *found.others]


def tell(figures: Mapping[str, Any]) -> None:
    """The table for people."""
    rows = {
        name: (
            _text(seconds),
            f"{1000 * figures['step_s'][name]:.1f}",
            f"{figures['sent_bytes_a_step'][name] / 1e3:.0f}",
        )
        for name, seconds in figures["seconds_to_target"].items()
    }
    print(table(rows, ("", f"s to {figures['target']}", "ms a step", "kB a host a step")))
    print(f"Seconds were measured of {', '.join(figures['seconds_measured_of'])}; else: step time x steps needed.")
    print("Evaluation and the start of processes are left out for all.")


def _text(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds:.1f}"


def spreads(found: Findings) -> dict[str, Any]:
    """Each speed-up by seed."""
    return {name: median_and_spread(found.speedups(name) or [0.0]) for name in HOOKS}


def records(traces: Iterable[Trace]) -> list[dict[str, Any]]:
    """All traces as JSON."""
    return [{"name": run.name, **run.record()} for run in traces]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_accuracy", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    config: dict[str, Any] = {
        "quick": options.quick, **TASK, "link": LINK, "best": str(SETTINGS[BEST]),
    }  # fmt: skip
    if options.quick:
        config |= {"target": QUICK_TARGET, "steps": QUICK_STEPS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.quick:
            found, more = quick(folder), {}
        else:
            with Lab(spec(LINK)) as shaped, Lab(spec("none")) as free:
                benches = Benches(shaped, free, folder)
                found = full(benches)
                more = accuracy_gpt.compare(benches)
    figures = figures_of(found) | more
    picture = (RESULTS / "quick" if options.quick else RESULTS) / "time_to_accuracy.png"
    draw(picture, lines_of(found), GLOBAL_BATCH, f"Fashion-MNIST, 4 hosts, {LINK}")
    tell(figures)
    runs = [*found.exact, *found.best, *found.others, *found.real]
    finish("time_to_accuracy", figures, config | {"spread": spreads(found), "runs": records(runs)}, seed=SEEDS[0])


if __name__ == "__main__":
    main()
