"""Predictions over HTTP, one sample a request: how many a second at a p99 of 50 ms, beside other servers.

python -m benchmarks.serve [--quick] [--rounds N] [--peers NAME,NAME]

Two models: the network of Fashion-MNIST, and wide and deep on tables of 150,000 ids (ours in Shoal's tables, the
peers' in torch's embeddings). h2load has 1, 4, 16, 32, 64 and 256 connections, each of which sends when it is answered;
goodput is the most requests a second that were answered with 200 at a p99 of at most 50 ms. All servers have the same
weights, answer the same, and may use all cores; h2load is on the last one. Each is started anew in each round, forth
and back; of a server's settings those are kept that do best at 16 or 64 connections. ``overhead_ms``: p50 at one
connection less what the bare model takes. ``--quick``: beside MLServer alone, if it is installed, both up at once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy_traces import table as text_table
from benchmarks.load import Load, load
from benchmarks.machine import finish, median_and_spread
from benchmarks.served_weights import Files, write_files
from benchmarks.servers import PEERS, Running, Server, generator_core, ours, running

P99_MS = 50.0
LADDER, QUICK_LADDER = (1, 4, 16, 32, 64, 256), (1, 16)
CHOOSING, LEAST_ANSWERED = (16, 64), 0.99
DURATION_S, QUICK_DURATION_S = 3.0, 1.0
QUICK_PEER, QUICK_VARIANT, QUICK_ROUNDS = "mlserver", "in process, batches", 3
MODELS = ("clothes", "clicks")

Rungs = Mapping[int, Load]


@dataclass
class Measured:
    """A server with one model: which settings were kept, what each did, and what came of each round."""

    server: Server
    variant: str
    tried: dict[str, float] = field(default_factory=dict)
    rounds: list[Rungs] = field(default_factory=list)

    def goodputs(self) -> list[float]:
        return [goodput(rungs, P99_MS) for rungs in self.rounds]

    def p50_ms(self) -> float | None:
        """At one connection."""
        found = [rungs[1].p50_ms for rungs in self.rounds if 1 in rungs]
        return statistics.median(each for each in found if each is not None) if any(found) else None

    def record(self) -> dict[str, Any]:
        return {
            "version": self.server.version, "variant": self.variant,
            "settings": dict(self.server.variants[self.variant]),
            "rps_by_variant": self.tried, "goodput_rps": median_and_spread(self.goodputs()), "p50_ms": self.p50_ms(),
            "rounds": [{str(number): rung.record() for number, rung in rungs.items()} for rungs in self.rounds],
        }  # fmt: skip


def goodput(rungs: Rungs, p99_ms: float) -> float:
    """The most requests a second that any number of connections had answered in time; 0 if none."""
    return max((found.requests_per_s for found in rungs.values() if keeps(found, p99_ms)), default=0.0)


def keeps(found: Load, p99_ms: float) -> bool:
    """Whether all but few were answered, and those in time."""
    return found.p99_ms is not None and found.p99_ms <= p99_ms and found.answered_fraction >= LEAST_ANSWERED


def climb(place: Running, ladder: Sequence[int], p99_ms: float, duration_s: float = DURATION_S) -> Rungs:
    """More and more connections, until answers are late with many."""
    rungs: dict[int, Load] = {}
    for connections in ladder:
        warm_up_s = min(1.0, duration_s / 2)
        rungs[connections] = load(place.target, connections=connections, duration_s=duration_s, warm_up_s=warm_up_s)
        if connections >= CHOOSING[0] and not keeps(rungs[connections], p99_ms):
            break
    return rungs


def choose(server: Server, model: str, files: Files) -> Measured:
    """The settings of a server that answer most in time; if none answers in time, most at all."""
    tried, at_all = dict[str, float](), dict[str, float]()
    for variant in server.variants:
        with running(server, variant, model, files) as place:
            rungs = climb(place, CHOOSING, P99_MS)
        tried[variant] = round(goodput(rungs, P99_MS), 1)
        at_all[variant] = max(found.requests_per_s for found in rungs.values())
        print(f"{model}: {server.name} {server.version}, {variant}: {tried[variant]:.0f}/s", flush=True)
    return Measured(server, max(tried, key=lambda variant: (tried[variant], at_all[variant])), tried)


def compare(model: str, files: Files, peers: Sequence[Server], rounds: int) -> dict[str, Measured]:
    """Each server in each round; every other round backwards."""
    found = {server.name: choose(server, model, files) for server in (ours(), *peers)}
    for number in range(rounds):
        for name in sorted(found, key=list(found).index, reverse=number % 2 == 1):
            one = found[name]
            with running(one.server, one.variant, model, files) as place:
                one.rounds.append(climb(place, LADDER, P99_MS))
            print(f"{model}, round {number}: {name} {one.goodputs()[-1]:.0f}/s", flush=True)
    return found


def compare_quickly(model: str, files: Files) -> dict[str, Measured]:
    """Us and one peer, in turns."""
    found = {"shoal": Measured(ours(), ours().single)}
    if PEERS[QUICK_PEER].is_installed():
        found[QUICK_PEER] = Measured(PEERS[QUICK_PEER], QUICK_VARIANT)
    with ExitStack() as stack:
        places = {
            name: stack.enter_context(running(one.server, one.variant, model, files)) for name, one in found.items()
        }
        for number in range(QUICK_ROUNDS):
            for name in sorted(places, reverse=number % 2 == 1):
                found[name].rounds.append(climb(places[name], QUICK_LADDER, P99_MS, QUICK_DURATION_S))
    return found


def against_best(found: Mapping[str, Measured]) -> tuple[str | None, float | None]:
    """The peer with the greatest goodput, and ours over its, by the median of the rounds."""
    medians = {name: statistics.median(one.goodputs()) for name, one in found.items() if name != "shoal"}
    best = max(medians, key=medians.__getitem__, default=None)
    if best is None or not medians[best]:
        return best, None
    pairs = zip(found["shoal"].goodputs(), found[best].goodputs(), strict=True)
    ratios = [mine / theirs for mine, theirs in pairs if theirs]
    return best, round(statistics.median(ratios), 2)


def tell(model: str, found: Mapping[str, Measured], bare_ms: float) -> None:
    """A table for people."""
    rows = {}
    for name, one in found.items():
        p50_ms, goodputs = one.p50_ms(), one.goodputs()
        spread = f"{min(goodputs):.0f} to {max(goodputs):.0f}"
        rows[f"{name} {one.server.version}, {one.variant}"] = (
            f"{p50_ms:.2f}" if p50_ms else "", f"{statistics.median(goodputs):.0f}", spread,
        )  # fmt: skip
    print(f"{model}; the bare model takes {bare_ms:.2f} ms")
    print(text_table(rows, ("", "p50 ms at 1", "goodput/s", "spread")), flush=True)


def figures_of(results: Mapping[str, Mapping[str, Measured]], bare_ms: Mapping[str, float]) -> dict[str, Any]:
    """What the last line says."""
    best, ratio = against_best(results["clothes"])
    us = results["clothes"]["shoal"]
    p50_ms = us.p50_ms()
    figures: dict[str, Any] = {
        "goodput_vs_best_peer": ratio,
        "overhead_ms": None if p50_ms is None else round(p50_ms - bare_ms["clothes"], 3),
        "best_peer": best,
        "goodput_rps": round(statistics.median(us.goodputs()), 1),
        "wide_deep_goodput_vs_best_peer": None,
        "p50_ms": p50_ms and round(p50_ms, 3),
        "bare_ms": round(bare_ms["clothes"], 3),
    }
    if "clicks" in results:
        figures["wide_deep_best_peer"], figures["wide_deep_goodput_vs_best_peer"] = against_best(results["clicks"])
        figures["wide_deep_goodput_rps"] = round(statistics.median(results["clicks"]["shoal"].goodputs()), 1)
    if best is None:
        figures["reason"] = f"{QUICK_PEER} is not installed, and --quick installs nothing: run it without"
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default=",".join(PEERS), help="which, by name")
    options = parser.parse_args()
    peers = [PEERS[name] for name in options.peers.split(",") if name]
    results, bare_ms = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS[:1] if options.quick else MODELS:
            files = write_files(model, Path(folder) / model)
            bare_ms[model] = files.bare_p50_ms(model)
            if options.quick:
                results[model] = compare_quickly(model, files)
            else:
                results[model] = compare(model, files, peers, options.rounds)
            tell(model, results[model], bare_ms[model])
    config = {
        "quick": options.quick, "p99_ms": P99_MS, "connections": QUICK_LADDER if options.quick else LADDER,
        "duration_s": QUICK_DURATION_S if options.quick else DURATION_S, "core_of_h2load": generator_core(),
        "bare_ms": bare_ms,
        "servers": {model: {name: one.record() for name, one in found.items()} for model, found in results.items()},
    }  # fmt: skip
    finish("serve", figures_of(results, bare_ms), config, seed=0)


if __name__ == "__main__":
    main()
