"""How a run's loss and accuracy went, by steps and by seconds, from its events; and the figure that shows many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.events import Event


@dataclass(frozen=True, kw_only=True)
class Point:
    """``loss`` is the mean since the point before; ``accuracy`` that of the test data, if it was measured there."""

    step: int
    at_s: float
    loss: float
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A run, from its first generation on. Seconds leave evaluation out."""

    name: str
    points: tuple[Point, ...]
    sent_bytes: float = 0.0
    """What a host's interface sent a step, by the kernel's counter, evaluation included."""

    def first_at(self, target: float) -> Point | None:
        """The first evaluation that reaches the accuracy."""
        return next((p for p in self.points if p.accuracy is not None and p.accuracy >= target), None)

    def evaluated(self) -> dict[int, float]:
        """The accuracies by step."""
        return {p.step: p.accuracy for p in self.points if p.accuracy is not None}

    @property
    def last_accuracy(self) -> float:
        """That of the last evaluation."""
        return list(self.evaluated().values())[-1]

    @property
    def step_s(self) -> float:
        """Seconds a step, from the first point to the last; where there is but one, from the beginning."""
        start = Point(step=0, at_s=0.0, loss=0.0)
        first, last = (start if len(self.points) == 1 else self.points[0]), self.points[-1]
        return (last.at_s - first.at_s) / (last.step - first.step)

    def at_step_time(self, step_s: float, name: str) -> Trace:
        """The same optimisation, had each step taken so long."""
        return replace(self, name=name, points=tuple(replace(p, at_s=p.step * step_s) for p in self.points))

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "steps": [p.step for p in self.points],
            "seconds": [round(p.at_s, 3) for p in self.points],
            "loss": [round(p.loss, 4) for p in self.points],
            "accuracy": [p.accuracy for p in self.points],
            "sent_bytes_a_step": round(self.sent_bytes),
        }


def trace(name: str, events: Iterable[Event], sent_bytes: float = 0.0) -> Trace:
    """A run's events as a trace. The evaluation of a step lasts from its ``progress`` to its ``evaluated``."""
    begun_s, spent_s, points = 0.0, 0.0, list[Point]()
    committed_s: dict[int, float] = {}
    for event in sorted(events, key=lambda e: float(e["at_s"])):
        match event["kind"]:
            case "generation" if not begun_s:
                begun_s = event["at_s"]
            case "progress":
                committed_s[event["step"]] = event["at_s"]
                at_s = event["at_s"] - begun_s - spent_s
                points.append(Point(step=event["step"], at_s=at_s, loss=event["loss"]))
            case "evaluated" if event["step"] in committed_s:
                spent_s += event["at_s"] - committed_s[event["step"]]
                points[-1] = replace(points[-1], accuracy=event["figures"].get("accuracy"))
    return Trace(name=name, points=tuple(points), sent_bytes=sent_bytes)


def mean_gap_pp(reference: Sequence[Trace], others: Sequence[Trace]) -> float:
    """By how many percentage points the others' accuracy is below the reference's, at the last step at which both were
    evaluated: the mean over seeds."""
    pairs = [(exact.evaluated(), run.evaluated()) for exact, run in zip(reference, others, strict=True)]
    gaps = [exact[last] - run[last] for exact, run in pairs for last in [max(exact.keys() & run.keys())]]
    return 100 * sum(gaps) / len(gaps)


def draw(path: Path, traces: Sequence[Trace], samples_a_step: int, title: str) -> None:
    """Loss over time and over samples, a line a strategy, as a PNG of 1200 x 500."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, (over_time, over_samples) = plt.subplots(1, 2, figsize=(12, 5), dpi=100, sharey=True)
    for line in traces:
        losses = [p.loss for p in line.points]
        (drawn,) = over_time.plot([p.at_s for p in line.points], losses, label=line.name)
        over_samples.plot([p.step * samples_a_step for p in line.points], losses, color=drawn.get_color())
    over_time.set(xscale="log", yscale="log", xlabel="seconds, at 100 Mbit/s", ylabel="training loss")
    over_samples.set(xlabel="samples")
    for axes in (over_time, over_samples):
        axes.grid(visible=True, which="both", alpha=0.25)
        for axis in (axes.xaxis, axes.yaxis) if axes is over_time else ():
            axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.set_minor_formatter(ticker.FormatStrFormatter("%g") if axis is axes.yaxis else ticker.LogFormatter())
    figure.legend(*over_time.get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=9)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def table(rows: Mapping[str, Sequence[str]], heads: Sequence[str]) -> str:
    """Rows by name as text for people."""
    lines = [heads, *((name, *cells) for name, cells in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
