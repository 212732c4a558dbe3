"""Rows a second from Parquet files through a training worker's loader, over what others read the same files with.

python -m benchmarks.ingest [--quick]

Some epochs from opening the files, shuffled anew each, in batches of 256. Ours: one worker with all 64 lanes. Against
it, each with its best of 0, 1 and 2 loader processes, and room in memory for all row groups, decoded:

- a map-style dataset in torch's ``DataLoader`` with ``shuffle=True``: the ratio that is asked for;
- the same with whole batches by ``__getitems__``, for who knows of it;
- an ``IterableDataset`` over row groups, whose batches each come from one or two of them;
- Ray Data, with a local shuffle over as many rows as ours are shuffled among; its best epoch, its start not counted.

And the map-style dataset again where memory is short: both may keep what our lanes are in, and no more.

Ray Data has an environment of its own, made when it is first needed; ``--quick`` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.loaders import (
    BATCH,
    ROWS_A_FILE,
    ROWS_A_GROUP,
    BatchedMapStyle,
    ByRowGroup,
    MapStyle,
    decode,
    loader_of,
    write_files,
)
from benchmarks.machine import REPOSITORY, finish, median_and_spread
from benchmarks.peers.envs import pins, python_of
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
    """The map-style dataset's rows a second with no more row groups kept than our lanes hold; a few batches tell."""
    loader = loader_of(MapStyle(paths, GROUPS_IN_SHORT_MEMORY // max(1, workers)), workers)
    batches = iter(loader)
    next(batches)
    began = time.perf_counter()
    num_rows = sum(len(labels) for _, labels in islice(batches, BATCHES_IN_SHORT_MEMORY))
    return num_rows / (time.perf_counter() - began)


def ray_data(paths: Sequence[Path], epochs: int) -> float:
    """Rows a second of Ray Data in its best epoch after the first, which starts its workers."""
    shuffled_rows = GROUPS_IN_SHORT_MEMORY * ROWS_A_GROUP
    command = [python_of("ray_data"), "-m", "benchmarks.peers.with_ray_data", BATCH, shuffled_rows, 1 + epochs, *paths]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, cwd=REPOSITORY)
    return max(json.loads(done.stdout.splitlines()[-1])[1:])


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
    print(f"{name:42} {our_rate:10,.0f} {their_rate:10,.0f} {statistics.median(ratios):7.2f}", flush=True)
    return {"ratio": median_and_spread(ratios), "rows_per_s": our_rate, "their_rows_per_s": their_rate}


def against_loader(kind: type, paths: Sequence[Path], scale: Scale) -> dict[str, Any]:
    """Against a ``DataLoader`` with its best number of processes, which are stated."""
    workers, tried = best_workers(lambda number: theirs(kind, paths, 1, number))
    found = compare(
        f"{kind.__name__}, {workers} processes",
        lambda: ours(paths, scale.epochs),
        lambda: theirs(kind, paths, scale.epochs, workers),
        scale.pairs,
    )
    return {**found, "workers": workers, "rows_per_s_by_workers": tried}


def against_short_memory(paths: Sequence[Path], scale: Scale) -> dict[str, Any]:
    """The same for the map-style dataset where neither may keep more than our lanes hold."""
    workers, tried = best_workers(lambda number: short_of_memory(paths, number))
    found = compare(
        f"MapStyle, short memory, {workers} processes",
        lambda: ours(paths, 1, cached_bytes=0),
        lambda: short_of_memory(paths, workers),
        scale.pairs,
    )
    return {**found, "workers": workers, "rows_per_s_by_workers": tried}


def compare_all(paths: Sequence[Path], scale: Scale, *, with_ray: bool) -> dict[str, dict[str, Any]]:
    """By the peer's name: the ratio, both rates, and what was tried."""
    ours(paths, 1)  # imports, and the files into the system's cache
    results = {
        "map_style": against_loader(MapStyle, paths, scale),
        "map_style_batched": against_loader(BatchedMapStyle, paths, scale),
        "by_row_group": against_loader(ByRowGroup, paths, scale),
        "map_style_short_memory": against_short_memory(paths, scale),
    }
    if with_ray:
        python_of("ray_data")
        found = compare("Ray Data", lambda: ours(paths, scale.epochs), lambda: ray_data(paths, scale.epochs), 3)
        results["ray_data"] = {**found, "version": pins("ray_data")["ray"]}
    return results


def figures_of(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the last line says: medians of ratios, ours over theirs, and our rows a second."""
    ratios = {name: round(result["ratio"]["median"], 2) for name, result in results.items()}
    figures: dict[str, Any] = {
        "ratio_vs_dataloader": ratios["map_style"],
        "rows_per_s": round(results["map_style"]["rows_per_s"]),
        "iterable_rowgroup_ratio": ratios["by_row_group"],
        "ray_data_ratio": ratios.get("ray_data"),
        "batched_map_style_ratio": ratios["map_style_batched"],
        "short_memory_ratio": ratios["map_style_short_memory"],
    }
    if "ray_data" not in ratios:
        figures["ray_data_reason"] = "--quick leaves it out, for its time"
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    scale = Scale(num_rows=45_000, epochs=3, pairs=3) if quick else Scale(num_rows=120_000, epochs=3, pairs=7)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), scale.num_rows)
        num_bytes = sum(path.stat().st_size for path in paths)
        print(f"{scale.num_rows:,} rows in {len(paths)} files of {num_bytes / 1e6:.0f} MB; {scale.epochs} epochs")
        print(f"{'':42} {'ours':>10} {'theirs':>10} {'ratio':>7}")
        results = compare_all(paths, scale, with_ray=not quick)
    config = {
        "quick": quick,
        **asdict(scale),
        "file_bytes": num_bytes,
        "rows_a_file": ROWS_A_FILE,
        "rows_a_group": ROWS_A_GROUP,
        "batch": BATCH,
        "num_lanes": NUM_LANES,
        "groups_in_short_memory": GROUPS_IN_SHORT_MEMORY,
    }
    finish("ingest", figures_of(results), {**config, "results": results}, seed=0)


if __name__ == "__main__":
    main()
