"""How a run goes, for people: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import IO, Any, Protocol

from shoal.events import Event

_LINE_EVERY_S = 5.0


class Progress(Protocol):
    """Where the driver tells what it sees."""

    def update(self, status: dict[str, Any]) -> None:
        """The coordinator's status, a few times a second."""
        ...

    def event(self, event: Event) -> None:
        """Something happened."""
        ...

    def say(self, text: str) -> None:
        """A line of the driver's own."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class Silent:
    """Shows nothing."""

    def update(self, status: dict[str, Any]) -> None:
        return

    def event(self, event: Event) -> None:
        return

    def say(self, text: str) -> None:
        return

    def close(self) -> None:
        return


class Lines:
    """Plain lines: what happened, and every few seconds how far it is."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._told_at_s = 0.0
        self._told_step = -1

    def update(self, status: dict[str, Any]) -> None:
        now_s = time.monotonic()
        if now_s - self._told_at_s >= _LINE_EVERY_S and status["step"] != self._told_step:
            self._told_at_s, self._told_step = now_s, status["step"]
            self.say(summary(status))

    def event(self, event: Event) -> None:
        text = story(event)
        if text:
            self.say(text)

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        return


class Bar:
    """A bar with loss, samples a second, workers, generation and time left; what happened scrolls above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (BarColumn(12), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = RichProgress(*columns, transient=False)
        self._task = self._bar.add_task("starting", total=None)
        self._bar.start()

    def update(self, status: dict[str, Any]) -> None:
        done, total = status["step"], status["total_steps"]
        self._bar.update(self._task, completed=done, total=total, description=brief(status))

    def event(self, event: Event) -> None:
        text = story(event)
        if text:
            self.say(text)

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.stop()


def progress_for(out: IO[str]) -> Progress:
    """A bar if ``out`` is a terminal, else lines."""
    return Bar() if out.isatty() else Lines(out)


def summary(status: dict[str, Any]) -> str:
    """A status in one line."""
    workers = [w for w in status["workers"] if w["rank"] is not None]
    at: dict[str, Any] = max(workers, key=lambda w: w.get("step", -1), default={})
    parts = [f"step {status['step']}/{status['total_steps']}"]
    if "loss" in at:
        parts += [f"loss {at['loss']:.4f}", f"{at['samples_per_s']:.0f} samples/s"]
    parts += [f"{len(workers)} workers", f"generation {status['generation']}"]
    return "  ".join(parts)


def brief(status: dict[str, Any]) -> str:
    """A status in half a line, for beside a bar."""
    workers = [w for w in status["workers"] if w["rank"] is not None]
    at: dict[str, Any] = max(workers, key=lambda w: w.get("step", -1), default={})
    speed = f" loss {at['loss']:.4f} {at['samples_per_s']:.0f}/s" if "loss" in at else ""
    return f"{status['step']}/{status['total_steps']}{speed} {len(workers)} workers gen {status['generation']}"


def table(status: dict[str, Any]) -> list[str]:
    """A line a worker: its lanes and where its steps' time goes, as far as that is known. Within 80 columns."""
    rows = [["worker", "host:pid", "lanes"]]
    rows += [[w["name"], f"{w['host']}:{w['pid']}", str(w["lanes"])] for w in status["workers"]]
    timed = any("compute_s" in worker for worker in status["workers"])
    if timed:
        rows[0] += [*_COLUMNS.values(), "sent"]
        for row, worker in zip(rows[1:], status["workers"], strict=True):
            row += [_milliseconds(worker.get(name)) for name in _COLUMNS]
            row.append(_bytes(worker.get("sent_bytes")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, place, *cells in rows:
        right = " ".join(cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True))
        lines.append(f"  {name.ljust(widths[0])} {place.ljust(widths[1])} {right}")
    return [*lines, "  compute to decode: ms a step; sent: bytes a step"] if timed else lines


def shard_table(shards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line a shard: what it holds, and how fast it is. Within 80 columns; nothing without shards."""
    if not shards:
        return []
    rows = [["shard", "rows", "size", "found", "pull ms", "push ms", "log", "stale", "waiting"]]
    for name, told in shards.items():
        tables = [figures for key, figures in told.items() if key.startswith("table/")]
        pulls = sum(told.get("staleness", {}).values())
        stale = sum(int(steps) * count for steps, count in told.get("staleness", {}).items())
        hits = [table["hit_rate"] for table in tables]
        rows.append([
            name, str(sum(table["rows"] for table in tables)), _bytes(sum(table["bytes"] for table in tables)),
            f"{100 * sum(hits) / len(hits):.0f} %" if hits else "-", _two_digits(told.get("pull_ms")),
            _two_digits(told.get("push_ms")), _bytes(told.get("log_bytes")), f"{stale / pulls:.1f}" if pulls else "-",
            str(told.get("waiting", 0)),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _two_digits(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


_COLUMNS = {
    "compute_s": "compute", "encode_s": "encode", "wire_s": "wire", "wait_s": "wait", "decode_s": "decode",
}  # fmt: skip
_UNITS = ("B", "kB", "MB", "GB", "TB")


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.{1 if seconds < 0.1 else 0}f}"


def _bytes(count: float | None) -> str:
    if count is None:
        return "-"
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_UNITS[power]}"


def story(event: Event) -> str:
    """An event as a sentence, for those that a person wants to read; else nothing."""
    match event:
        case {"kind": "generation"}:
            origin = {"seed": "the seed", "store": "the store", "peers": "its survivors"}[event["origin"]]
            healing = f"; {', '.join(event['healing'])} catching up" if event["healing"] else ""
            members = ", ".join(event["members"])
            return f"generation {event['generation']}: {members}, from step {event['base_step']} of {origin}{healing}"
        case {"kind": "lost"}:
            return f"lost {event['worker']}: {event['reason']}"
        case {"kind": "deal", "reason": "balance"}:
            lanes = ", ".join(f"{worker} {count}" for worker, count in event["lanes"].items())
            return f"lanes move to the faster workers: {lanes}"
        case {"kind": "healed"}:
            return f"{event['worker']} has caught up at step {event['step']}"
        case {"kind": "stored"}:
            return f"version {event['step']} is stored"
        case {"kind": "store_failed"}:
            return f"version {event['step']} could not be stored, training goes on: {event['reason']}"
        case {"kind": "evaluated"}:
            return f"step {event['step']}: {figures_text(event['figures'])}"
        case {"kind": "leave_asked" | "refused"}:
            return f"{event['worker']} {event['kind'].replace('_', ' ')} {event.get('reason', '')}".rstrip()
        case {"kind": "stalled"}:
            return f"generation {event['generation']} stalled: nothing moves between its members"
    return ""


def figures_text(figures: dict[str, Any]) -> str:
    """Metrics in one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if isinstance(value, int | float))
