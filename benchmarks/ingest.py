"""Rows a second from Parquet files through a training worker's loader, over what others read the same files with.

python -m benchmarks.ingest [--quick]

Some epochs from opening the files, shuffled anew each, in batches of 256. Ours: one worker with all 64 lanes. Against
it, each with its best of 0, 1 and 2 loader processes, and room in memory for all row groups, decoded:

- a map-style dataset in torch's ``DataLoader`` with ``shuffle=True``: the ratio that is asked for;
- the same with whole batches by ``__getitems__``, for who knows of it;
- an ``IterableDataset`` over row groups, whose batches each come from one or two of them;
- Ray Data, with a local shuffle over as many rows as ours are shuffled among.

And the map-style dataset again where memory is short: both may keep what our lanes are in, and no more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.loaders import (
    BATCH,
    BatchedMapStyle,
    ByRowGroup,
    MapStyle,
    decode,
    loader_of,
    write_files,
)
from benchmarks.machine import finish, median_and_spread
from shoal.lanes import Order, Steps
from shoal.sources import Parquet, Prefetch

NUM_LANES = 64
GROUPS_IN_SHORT_MEMORY = NUM_LANES * 5 // 4
BATCHES_IN_SHORT_MEMORY = 10

Contestant = Callable[[], float]
"""Reads for a while from nothing opened, and says how many rows a second that were."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is read, and how often."""

    num_rows: int
    epochs: int
    pairs: int


def ours(paths: Sequence[Path], epochs: int, **options: Any) -> float:
    """Rows a second, as a worker in training reads them."""
    began = time.perf_counter()
    source = Parquet(paths, decode=decode, **options)
    sizes = source.block_sizes()
    steps = Steps(sum(sizes), BATCH, NUM_LANES, epochs)
    orders = lru_cache(2)(lambda epoch: Order(sizes, NUM_LANES, 0, epoch))
    reader = source.open()
    loader = Prefetch(reader, orders, steps, tuple(range(NUM_LANES)), first_step=0)
    num_rows = sum(len(labels) for local in loader for _, labels in local.batches)
    rate = num_rows / (time.perf_counter() - began)
    loader.close()
    reader.close()
    assert num_rows == epochs * sum(sizes)
    return rate


def theirs(kind: type, paths: Sequence[Path], epochs: int, workers: int) -> float:
    """Rows a second of a ``DataLoader``."""
    began = time.perf_counter()
    dataset = kind(paths) if kind is ByRowGroup else kind(paths, most_kept=1 << 30)
    loader = loader_of(dataset, workers)
    num_rows = sum(len(labels) for _ in range(epochs) for _, labels in loader)
    return num_rows / (time.perf_counter() - began)


def short_of_memory(paths: Sequence[Path], workers: int) -> float:
    """The map-style dataset's rows a second, with as many row groups kept as our lanes hold; some batches are enough."""
    loader = loader_of(MapStyle(paths, GROUPS_IN_SHORT_MEMORY // max(1, workers)), workers)
    batches = iter(loader)
    next(batches)
    began = time.perf_counter()
    num_rows = sum(len(labels) for _, labels in islice(batches, BATCHES_IN_SHORT_MEMORY))
    return num_rows / (time.perf_counter() - began)


def best_workers(measure: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """Which of 0, 1 and 2 loader processes reads most, and how much each reads."""
    rates = {workers: round(measure(workers)) for workers in (0, 1, 2)}
    return max(rates, key=lambda workers: rates[workers]), rates


def in_turns(one: Contestant, other: Contestant, pairs: int) -> tuple[list[float], list[float]]:
    """Rates of both, pair by pair, who goes first alternating."""
    rates: tuple[list[float], list[float]] = [], []
    for pair in range(pairs):
        for who in (0, 1) if pair % 2 == 0 else (1, 0):
            rates[who].append((one, other)[who]())
    return rates


def compare(name: str, one: Contestant, other: Contestant, pairs: int) -> dict[str, Any]:
    """The ratio of rates, ours over theirs, and both."""
    our_rates, their_rates = in_turns(one, other, pairs)
    ratios = [a / b for a, b in zip(our_rates, their_rates, strict=True)]
    our_rate, their_rate = statistics.median(our_rates), statistics.median(their_rates)
    print(f"{name:36} {our_rate:12,.0f} {their_rate:12,.0f} {statistics.median(ratios):8.2f}", flush=True)
    return {"ratio": median_and_spread(ratios), "rows_per_s": our_rate, "their_rows_per_s": their_rate}


def compare_all(paths: Sequence[Path], scale: Scale) -> dict[str, Any]:
    """By the peer's name: the ratio, both rates, and the loader processes tried."""
    results: dict[str, Any] = {}
    epochs = scale.epochs
    for name, kind in (("map-style", MapStyle), ("batched", BatchedMapStyle), ("by row group", ByRowGroup)):
        workers, tried = best_workers(lambda w, kind=kind: theirs(kind, paths, 1, w))
        found = compare(
            f"{name}, {workers} processes",
            lambda: ours(paths, epochs),
            lambda kind=kind, workers=workers: theirs(kind, paths, epochs, workers),
            scale.pairs,
        )
        results[name] = {**found, "workers": workers, "rows_per_s_by_workers": tried}
    workers, tried = best_workers(lambda w: short_of_memory(paths, w))
    found = compare(
        f"map-style, short memory, {workers} processes",
        lambda: ours(paths, 1, cached_bytes=0),
        lambda: short_of_memory(paths, workers),
        scale.pairs,
    )
    results["short memory"] = {**found, "workers": workers, "rows_per_s_by_workers": tried}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    scale = Scale(num_rows=60_000, epochs=2, pairs=3) if options.quick else Scale(num_rows=150_000, epochs=3, pairs=7)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), scale.num_rows)
        num_bytes = sum(path.stat().st_size for path in paths)
        print(
            f"{scale.num_rows:,} rows, {num_bytes / 1e6:.0f} MB, {len(paths)} files; epochs from opening: {scale.epochs}"
        )
        print(f"{'':36} {'ours':>12} {'theirs':>12} {'ratio':>8}")
        results = compare_all(paths, scale)
    figures = {
        "ratio_vs_dataloader": results["map-style"]["ratio"]["median"],
    }
    print(figures)


if __name__ == "__main__":
    main()
