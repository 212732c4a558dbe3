"""One epoch under faults drawn at random: is every sample committed exactly once, and is the model the same?

python -m benchmarks.exactly_once [--quick] [--seed N]

The job counts for itself: its model has a parameter with one entry a sample, whose gradient adds one for each time that
the sample is part of a committed step. No bookkeeping of Shoal's own is believed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import shoal
from benchmarks.machine import REPOSITORY, finish
from benchmarks.trials import Trial, trial
from shoal.testing import Fault, FaultPlan

JOB = REPOSITORY / "tests" / "runs" / "counting.py"
WORKERS = 3
BATCH = 40
FIRST_STEP, STEPS_APART = 20, 30
KINDS = ("kill", "freeze", "leave", "join", "scale_up", "scale_down", "kill_coordinator", "kill_healing")


def draw(num_faults: int, seed: int) -> FaultPlan:
    """Each kind in turn, in random order, on random ranks, at random steps."""
    chance = random.Random(seed)
    kinds = [kind for _ in range(-(-num_faults // len(KINDS))) for kind in chance.sample(KINDS, len(KINDS))]
    plan, target = FaultPlan(), WORKERS
    for number, kind in enumerate(kinds[:num_faults]):
        step = FIRST_STEP + number * STEPS_APART + chance.randrange(STEPS_APART // 2)
        rank = chance.randrange(WORKERS)
        if kind in ("join", "scale_up", "scale_down"):
            change = {"join": 1, "scale_up": 2, "scale_down": -2}[kind]
            target = min(5, max(2, target + change))
            plan = plan.scale(target, at_step=step)
        elif kind == "kill_healing":
            plan = plan.kill(at_step=step, rank=rank).add(Fault("kill_healing", step))
        else:
            plan = plan.add(Fault(kind, step, rank))  # type: ignore[arg-type]
    return plan


def counts_of(done: Trial) -> torch.Tensor:
    """How often each sample was committed."""
    model: Any = shoal.load_model(done.run)
    return (-model.counts.detach() * BATCH).round(decimals=6)


def largest_difference(one: Trial, other: Trial) -> float:
    """Over all parameters of the network."""
    states = [shoal.load_model(done.run).net.state_dict() for done in (one, other)]
    return max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])


def measure(num_faults: int, seed: int, folder: Path, *, float64: bool) -> tuple[Trial, Trial]:
    """The same epoch undisturbed and under faults."""
    samples = BATCH * (FIRST_STEP + (num_faults + 1) * STEPS_APART)
    env = {"COUNTING_SAMPLES": samples, "COUNTING_STEP_S": 0.02, "COUNTING_FLOAT64": "1" if float64 else ""}
    name = "float64" if float64 else "float32"
    calm = trial(f"calm-{name}", JOB, FaultPlan(), workers=WORKERS, folder=folder, **env)
    stormy = trial(f"stormy-{name}", JOB, draw(num_faults, seed), workers=WORKERS, folder=folder, **env)
    return calm, stormy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    num_faults = 5 if options.quick else 24
    with tempfile.TemporaryDirectory() as folder:
        calm, stormy = measure(num_faults, options.seed, Path(folder), float64=False)
        counts = counts_of(stormy)
        figures: dict[str, Any] = {
            "faults": len(stormy.inflicted),
            "samples": len(counts),
            "samples_lost": int((counts < 0.5).sum()),
            "samples_repeated": int((counts > 1.5).sum()),
            "generations": sum(e["kind"] == "generation" for e in stormy.run.events),
            "max_abs_diff": largest_difference(calm, stormy),
        }
        if not options.quick:
            figures["max_abs_diff_float64"] = largest_difference(
                *measure(num_faults, options.seed, Path(folder), float64=True)
            )
    for hit in stormy.inflicted:
        print(f"step {hit.fault.at_step:5}  {hit.fault.kind:16} {hit.worker}")
    print(f"each sample was committed: {dict(Counter(counts.tolist()))} (times: samples)")
    finish("exactly_once", figures, {"workers": WORKERS, "kinds": KINDS, "quick": options.quick}, seed=options.seed)


if __name__ == "__main__":
    main()
