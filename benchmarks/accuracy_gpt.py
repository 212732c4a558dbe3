"""The tiny GPT's part of time to accuracy: its loss at equal samples and at equal time, strategy by strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.accuracy_runs import Benches
from benchmarks.accuracy_traces import Trace, draw
from benchmarks.machine import REPOSITORY, RESULTS

TEXT = REPOSITORY.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
JOB = "accuracy_gpt_job.py"
COMPRESSED = ("allreduce_int8", "diloco_8_int4")


def compare(benches: Benches) -> dict[str, Any]:
    """Figures under ``gpt``; null where the text is not there. The exact exchange runs at the link's rate too."""
    if not TEXT.exists():
        print(f"tiny GPT: skipped, for want of {TEXT.relative_to(REPOSITORY.parent)} beside the repository")
        return {"gpt": None}
    runs = [benches.ours(name, job=JOB) for name in ("allreduce_fp32", *COMPRESSED)]
    for run in runs:
        print(f"tiny GPT, {run.name}: loss {run.points[-1].loss:.3f} after {run.points[-1].at_s:.1f} s", flush=True)
    from benchmarks.accuracy_gpt_job import GLOBAL_BATCH

    draw(RESULTS / "time_to_accuracy_gpt.png", runs, GLOBAL_BATCH, "tiny GPT on characters, 4 hosts, 100mbit")
    return {"gpt": figures_of(runs)}


def figures_of(runs: Sequence[Trace]) -> dict[str, Any]:
    """By strategy: the loss at the end, seconds to there, and the loss when the fastest of all was there."""
    first_s = min(run.points[-1].at_s for run in runs)
    return {
        run.name: {
            "loss_at_equal_samples": round(run.points[-1].loss, 4),
            "loss_at_equal_time": round(loss_at(run, first_s), 4),
            "seconds": round(run.points[-1].at_s, 2),
            "step_s": round(run.step_s, 4),
            "sent_bytes_a_step": round(run.sent_bytes),
        }
        for run in runs
    }


def loss_at(run: Trace, at_s: float) -> float:
    """The newest loss that was known then; that of the first point if none was."""
    known = [p.loss for p in run.points if p.at_s <= at_s]
    return known[-1] if known else run.points[0].loss
