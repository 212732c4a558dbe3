"""Four workers, each four times as slow in spells that come by chance (15 % of the time): how soon is a loss reached?

python -m benchmarks.staleness [--quick]

``Sync``, ``Bounded`` by 1, 4 and 16 steps, and ``Async``. Time counts from the first step on; the loss is the mean of a
round of 100 steps, all workers' samples, as the event log tells it. Staleness is what the shard has counted: by how
many steps the lane that was furthest behind was behind the step that a pull was for.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy_traces import table as text_table
from benchmarks.machine import RESULTS, finish
from benchmarks.staleness_job import SPELL_S, STEP_S, STRATEGIES
from benchmarks.trials import trial
from shoal.testing import FaultPlan

JOB = Path(__file__).parent / "staleness_job.py"
WORKERS = 4
BOUNDS = {"sync": 0, "bounded_1": 1, "bounded_4": 4, "bounded_16": 16}


@dataclass(frozen=True)
class Course:
    """A run's mean losses: seconds since the first step, steps done, and the loss of the round before; and how many
    pulls were how many steps stale."""

    at_s: tuple[float, ...]
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    staleness: Mapping[int, int]

    def seconds_to(self, loss: float) -> float | None:
        """When a round's mean was no higher than that for the first time; between two rounds, in proportion."""
        before: tuple[float, float] | None = None
        for at_s, found in zip(self.at_s, self.losses, strict=True):
            if found <= loss:
                if before is None or before[1] <= found:
                    return at_s
                return before[0] + (at_s - before[0]) * (before[1] - loss) / (before[1] - found)
            before = (at_s, found)
        return None


def course(name: str, folder: Path, steps: int, repeat: int) -> Course:
    """Train with a strategy."""
    env = {"STALENESS_STRATEGY": name, "STALENESS_STEPS": steps}
    run = trial(f"{name}-{repeat}", JOB, FaultPlan(), workers=WORKERS, folder=folder, **env).run
    begun_s = next(e["at_s"] for e in run.events if e["kind"] == "generation")
    told = [e for e in run.events if e["kind"] == "progress"]
    shards = [e for e in run.events if e["kind"] == "tables"][-1]["shards"]
    staleness = {int(steps): count for steps, count in shards["s0"]["staleness"].items()}
    return Course(
        tuple(e["at_s"] - begun_s for e in told), tuple(e["step"] for e in told), tuple(e["loss"] for e in told),
        staleness,
    )  # fmt: skip


def draw(path: Path, courses: Mapping[str, Course], target: float) -> None:
    """Loss over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for name, found in courses.items():
        axes.plot(found.at_s, found.losses, marker=".", label=name)
    axes.axhline(target, color="grey", linewidth=0.8)
    axes.set_xlabel("seconds")
    axes.set_ylabel("mean loss of 100 steps")
    axes.set_title("4 workers, each slowed 4 times in 15 % of the time")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    names = ("sync", "bounded_16") if options.quick else tuple(STRATEGIES)
    steps, repeats = (250, 1) if options.quick else (1000, 3)
    courses: dict[str, list[Course]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for name in names:
                courses[name].append(course(name, Path(folder), steps, repeat))
                print(f"{name}: {steps} steps in {courses[name][-1].at_s[-1]:.1f} s", flush=True)
    target = max(found.losses[-1] for several in courses.values() for found in several)
    seconds: dict[str, float] = {}
    rows, violations = {}, 0
    for name, several in courses.items():
        times = sorted(found.seconds_to(target) or float("inf") for found in several)
        seconds[name] = times[len(times) // 2]
        together: dict[int, int] = {}
        for found in several:
            for stale, count in found.staleness.items():
                together[stale] = together.get(stale, 0) + count
        violations += sum(count for stale, count in together.items() if name in BOUNDS and stale > BOUNDS[name])
        mean = sum(stale * count for stale, count in together.items()) / sum(together.values())
        rows[name] = (f"{seconds[name]:.1f}", f"{several[0].losses[-1]:.4f}", f"{mean:.2f}", str(max(together)))
    bounded = {name: seconds[name] for name in names if name.startswith("bounded")}
    figures: dict[str, Any] = {
        "bounded_vs_sync": round(seconds["sync"] / min(bounded.values()), 2),
        "best_bound": min(bounded, key=bounded.__getitem__),
        "violations": violations,
        "target_loss": round(target, 4),
        "seconds_to_target": {name: round(value, 2) for name, value in seconds.items()},
        "staleness": {name: dict(sorted(several[-1].staleness.items())) for name, several in courses.items()},
    }
    draw((RESULTS / "quick" if options.quick else RESULTS) / "staleness.png",
         {name: several[0] for name, several in courses.items()}, target)  # fmt: skip
    print(text_table(rows, ("", "s to target", "last loss", "mean staleness", "most")))
    config = {"quick": options.quick, "step_s": STEP_S, "spell_s": SPELL_S, "steps": steps, "repeats": repeats}
    finish("staleness", figures, config)


if __name__ == "__main__":
    main()
