"""Runs of Shoal under a fault plan, for benchmarks: what befell them, and when they committed what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import shoal
from shoal.launch.run import runs_folder
from shoal.testing import FaultPlan, Inflicted
from shoal.training.folder import RunFolder


@dataclass(frozen=True)
class Trial:
    """A run that has ended, and the faults that were inflicted on it."""

    run: shoal.Run
    inflicted: list[Inflicted]

    @property
    def commits(self) -> list[tuple[float, int]]:
        """When (seconds since 1970) which step was committed, oldest first."""
        return sorted((e["at_s"], e["step"]) for e in self.run.events if e["kind"] == "progress")

    def resumed_after(self, hit: Inflicted) -> float:
        """Seconds from a fault to the first commit of the generation that it led to: survivors that had all they needed
        for one more step do not count as recovered."""
        begun_s = next(e["at_s"] for e in self.run.events if e["kind"] == "generation" and e["at_s"] > hit.at_s)
        return next(at_s for at_s, _ in self.commits if at_s > begun_s) - hit.at_s

    def longest_gap(self, from_s: float, until_s: float) -> float:
        """The longest time without a commit that overlaps with the window."""
        times = [at_s for at_s, _ in self.commits]
        gaps = [b - a for a, b in pairwise(times) if b > from_s and a < until_s]
        return max(gaps, default=0.0)


def trial(
    name: str, job: Path, plan: FaultPlan, *, workers: int, folder: Path, settings: Sequence[str] = (), **env: Any
) -> Trial:
    """Run the job of a file under the plan, with its run kept in ``folder``; ``env`` is set for its processes."""
    os.environ["SHOAL_RUNS"] = str(folder)
    os.environ.update({key: str(value) for key, value in env.items()})
    place = RunFolder((runs_folder() / name).resolve())
    with plan.befalling(place) as inflicted:
        options = shoal.TrainOptions(quiet=True)
        run = shoal.train(job, workers=workers, name=name, settings=settings, options=options)
    return Trial(run, list(inflicted))
