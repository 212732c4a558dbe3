"""More requests than a server can answer: how many it answers in time, and how soon it refuses the rest.

python -m benchmarks.overload [--quick] [--peers NAME,NAME]

The model computes for milliseconds, on one thread and in one copy at every server; ours lays its convolutions out so
that they take about half as long. Capacity is the most requests a second that we answer at a p99 of 100 ms, the median
of three tries. Then h2load offers 0.5, 1, 1.5, 2 and 3 times that, evenly and without waiting for answers, to us and to
the peers. In time is an answer of 200 within 250 ms; our requests say so with the protocol's ``timeout``, and a peer
that can be told to refuse is, and computes at most 8 samples at once: this model gains nothing from more.
``goodput_fraction``: what is answered in time at twice the capacity, over the capacity. ``refused_p99_ms``: of 429 and
503 there. ``memory_growth_mb``: of all of our server's processes, from capacity to the end;
``memory_growth_again_mb``: over the same once more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy_traces import table as text_table
from benchmarks.load import Load, load
from benchmarks.machine import RESULTS, finish
from benchmarks.serve import climb, goodput
from benchmarks.served_weights import Files, write_files
from benchmarks.servers import DEADLINE_S, GUARDED_AT_ONCE, PEERS, Running, Server, generator_core, ours, running

MODEL, P99_MS = "heavy", 100.0
LADDER = (1, 4, 8, 16, 32)
CLIMBS, CLIMB_S = 3, 4.0
OFFERED, QUICK_OFFERED = (0.5, 1.0, 1.5, 2.0, 3.0), (1.0, 2.0)
DURATION_S, QUICK_DURATION_S = 8.0, 4.0
TWICE = 2.0


@dataclass(frozen=True)
class Course:
    """What came of each rate, as times the capacity; memory once the server had answered at capacity, and after all."""

    loads: Mapping[float, Load]
    before_bytes: int
    after_bytes: int
    again_bytes: int

    def in_time_per_s(self) -> dict[float, float]:
        return {times: found.within_per_s(1e3 * DEADLINE_S) for times, found in self.loads.items()}

    def growth_mb(self) -> float:
        return (self.after_bytes - self.before_bytes) / 1e6

    def growth_again_mb(self) -> float:
        return (self.again_bytes - self.after_bytes) / 1e6

    def record(self) -> dict[str, Any]:
        in_time = self.in_time_per_s()
        return {
            "memory_before_bytes": self.before_bytes, "memory_after_bytes": self.after_bytes,
            "memory_again_bytes": self.again_bytes,
            "loads": {
                str(times): {**found.record(), "in_time_per_s": round(in_time[times], 2)}
                for times, found in self.loads.items()
            },
        }  # fmt: skip


def course(
    place: Running, capacity: float, offered: Sequence[float], duration_s: float, *, again: bool = False
) -> Course:
    """Offer more and more; ``again``: and then too much once more."""
    loads, before_bytes = {}, place.rss_bytes()
    for times in offered:
        loads[times] = load(place.target, rate=times * capacity, duration_s=duration_s)
        if times <= 1:
            before_bytes = place.rss_bytes()
    after_bytes = place.rss_bytes()
    for times in offered:
        if again and times > 1:
            load(place.target, rate=times * capacity, duration_s=duration_s)
    return Course(loads, before_bytes, after_bytes, place.rss_bytes())


def tell(name: str, found: Course) -> None:
    """A table for people."""
    rows = {}
    for times, one in found.loads.items():
        rows[f"{times:g} times"] = (
            f"{one.offered_per_s:.0f}", f"{found.in_time_per_s()[times]:.0f}", shown(one.p50_ms), shown(one.p99_ms),
            shown(one.refused_p99_ms), " ".join(f"{status}:{count}" for status, count in one.by_status.items()),
            str(one.errors),
        )  # fmt: skip
    print(f"{name}: {found.growth_mb():.1f} MB more at the end, and {found.growth_again_mb():.1f} after the same again")
    heads = ("", "offered/s", "in time/s", "p50 ms", "p99 ms", "refused p99 ms", "by status", "errors")
    print(text_table(rows, heads), flush=True)


def shown(value: float | None) -> str:
    """Nothing for None."""
    return "" if value is None else f"{value:.1f}"


def draw(path: Path, courses: Mapping[str, Course], capacity: float) -> None:
    """What is answered in time over what is offered."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for name, found in courses.items():
        offered = [times * capacity for times in found.loads]
        axes.plot(offered, list(found.in_time_per_s().values()), marker=".", label=name)
    axes.axhline(capacity, color="grey", linewidth=0.8)
    axes.set_xlabel("requests offered a second")
    axes.set_ylabel(f"answered within {1e3 * DEADLINE_S:.0f} ms, a second")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def figures_of(courses: Mapping[str, Course], capacity: float) -> dict[str, Any]:
    """What the last line says."""
    us = courses["shoal"]
    figures: dict[str, Any] = {
        "goodput_fraction": round(us.in_time_per_s()[TWICE] / capacity, 3),
        "refused_p99_ms": us.loads[TWICE].refused_p99_ms and round(us.loads[TWICE].refused_p99_ms, 1),
        "memory_growth_mb": round(us.growth_mb(), 1),
        "memory_growth_again_mb": round(us.growth_again_mb(), 1),
        "capacity_rps": round(capacity, 1),
    }
    others = {name: found.in_time_per_s()[TWICE] / capacity for name, found in courses.items() if name != "shoal"}
    figures["best_peer"] = max(others, key=others.__getitem__) if any(others.values()) else None
    figures["peer_goodput_fraction"] = round(max(others.values()), 3) if others else None
    return figures


def measure(server: Server, files: Files, capacity: float, quick: bool) -> Course:
    """One server, with one copy of the model."""
    offered, duration_s = (QUICK_OFFERED, QUICK_DURATION_S) if quick else (OFFERED, DURATION_S)
    with running(server, server.single, MODEL, files, guarded=True) as place:
        found = course(place, capacity, offered, duration_s, again=server.name == "shoal")
    tell(f"{server.name} {server.version}, {server.single}", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", default=",".join(PEERS), help="which, by name")
    options = parser.parse_args()
    peers = [] if options.quick else [PEERS[name] for name in options.peers.split(",") if name]
    courses = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(MODEL, Path(folder) / MODEL)
        bare_ms = files.bare_p50_ms(MODEL)
        with running(ours(), ours().single, MODEL, files) as place:
            climbs = [
                climb(place, LADDER, P99_MS, CLIMB_S / (3 if options.quick else 1))
                for _ in range(1 if options.quick else CLIMBS)
            ]
        capacity = statistics.median(goodput(rungs, P99_MS) for rungs in climbs)
        print(f"the bare model takes {bare_ms:.2f} ms; capacity: {capacity:.0f} requests a second", flush=True)
        if not capacity:
            found = {number: rung.p99_ms for rungs in climbs for number, rung in rungs.items()}
            raise SystemExit(f"a p99 of {P99_MS:g} ms is too much to ask here: by connections it is {found}")
        for server in (ours(), *peers):
            courses[server.name] = measure(server, files, capacity, options.quick)
    draw((RESULTS / "quick" if options.quick else RESULTS) / "overload.png", courses, capacity)
    config = {
        "quick": options.quick, "bare_ms": bare_ms, "capacity_p99_ms": P99_MS, "deadline_s": DEADLINE_S,
        "duration_s": QUICK_DURATION_S if options.quick else DURATION_S, "core_of_h2load": generator_core(),
        "capacity": [{str(number): rung.record() for number, rung in rungs.items()} for rungs in climbs],
        "peers_most_at_once": GUARDED_AT_ONCE,
        "peers": {
            each.name: {"version": each.version, "settings": {**each.variants[each.single], **each.guarded}}
            for each in peers
        },
        "courses": {name: found.record() for name, found in courses.items()},
    }  # fmt: skip
    finish("overload", figures_of(courses, capacity), config, seed=0)


if __name__ == "__main__":
    main()
