"""A sparse table on one thread: rows a second, bytes a row, pauses as it grows, and deltas against full images.

python -m benchmarks.table [--quick]

Rows are of 16 weights. Batches are of distinct ids out of a million, drawn anew each time. Beside it, in turns: the
slow twin in Python that the tests compare with, and ``torch.nn.Embedding(sparse=True)`` of a million rows, with the
optimizer of the same name (``Adagrad``; ``SparseAdam``), which knows ids from 0 to a million only: its pull is a
forward, and its push is the optimizer's step with a sparse gradient that is there already. Bytes are what the kernel
says is resident.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy_traces import table as text_table
from benchmarks.machine import finish, median_and_spread
from shoal.tables import Adagrad, Adam, Rule, TableSpec
from shoal.tables.table import Table
from shoal.testing.tables import PlainTable

DIM, NUM_IDS = 16, 1_000_000
RULES: Mapping[str, Rule] = {"adagrad": Adagrad(lr=0.05), "adam": Adam(lr=0.001)}
BATCHES = (500, 5_000, 100_000)
GROWTH_BATCH = 10_000
TOUCHED = 0.01


class Ours:
    """A table that all ids have been pushed to."""

    def __init__(self, rule: Rule) -> None:
        self._table = Table(TableSpec(name="rows", dim=DIM, rule=rule))
        self.push(np.arange(NUM_IDS), np.zeros((NUM_IDS, DIM), np.float32))

    def pull(self, ids: np.ndarray) -> None:
        self._table.pull(ids)

    def push(self, ids: np.ndarray, gradients: np.ndarray) -> None:
        self._table.push(ids, gradients)


class Twin(Ours):
    """The one in Python; it is asked for less."""

    def __init__(self, rule: Rule) -> None:
        self._table = PlainTable(TableSpec(name="rows", dim=DIM, rule=rule))  # type: ignore[assignment]


class Torchs:
    """torch's embedding and its optimizer."""

    def __init__(self, rule: Rule) -> None:
        self._embedding = torch.nn.Embedding(NUM_IDS, DIM, sparse=True)
        weights = self._embedding.parameters()
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.Adagrad(weights, lr=0.05) if isinstance(rule, Adagrad) else torch.optim.SparseAdam(weights)
        )

    def pull(self, ids: np.ndarray) -> None:
        with torch.no_grad():
            self._embedding(torch.from_numpy(ids))

    def push(self, ids: np.ndarray, gradients: np.ndarray) -> None:
        indices = torch.from_numpy(ids)[None]
        gradient = torch.sparse_coo_tensor(indices, torch.from_numpy(gradients), (NUM_IDS, DIM), is_coalesced=True)
        self._embedding.weight.grad = gradient
        self._optimizer.step()


@dataclass(frozen=True)
class Speed:
    """Rows a second, in turns."""

    rows: int
    pull: Mapping[str, list[float]]
    push: Mapping[str, list[float]]


def speeds(rule: Rule, batches: Sequence[int], turns: int) -> list[Speed]:
    """At each size of a batch."""
    random = np.random.default_rng(0)
    tables = {"ours": Ours(rule), "torch": Torchs(rule), "twin": Twin(rule)}
    found = []
    for rows in batches:
        speed = Speed(rows, {name: [] for name in tables}, {name: [] for name in tables})
        for turn in range(turns + 1):
            ids = np.sort(random.choice(NUM_IDS, rows, replace=False))
            gradients = random.standard_normal((rows, DIM), dtype=np.float32)
            for name, table in tables.items():
                if name == "twin" and (rows > BATCHES[1] or turn > 1):
                    continue
                times = timed(lambda t=table, i=ids: t.pull(i)), timed(lambda t=table, i=ids, g=gradients: t.push(i, g))
                if turn:  # the first warms up
                    speed.pull[name].append(rows / times[0])
                    speed.push[name].append(rows / times[1])
        found.append(speed)
    return found


def timed(act: Callable[[], Any]) -> float:
    """Seconds that it took."""
    begun_s = time.perf_counter()
    act()
    return time.perf_counter() - begun_s


def resident_bytes() -> int:
    """This process's, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def grow(num_rows: int) -> tuple[dict[str, Any], Table]:
    """From nothing to so many rows, in batches of random ids."""
    random = np.random.default_rng(1)
    table = Table(TableSpec(name="rows", dim=DIM, rule=Adagrad(lr=0.05)))
    gradients = np.zeros((GROWTH_BATCH, DIM), np.float32)
    before, pauses = resident_bytes(), []
    for _ in range(num_rows // GROWTH_BATCH):
        ids = random.integers(-(2**63), 2**63 - 1, GROWTH_BATCH)
        pauses.append(timed(lambda i=ids: table.push(i, gradients)))
    grown = resident_bytes() - before
    figures = {
        "rows_grown": table.stats.num_rows,
        "bytes_per_row": round(grown / table.stats.num_rows, 1),
        "longest_pause_ms": round(1e3 * max(pauses), 2),
        "median_push_ms": round(1e3 * statistics.median(pauses), 2),
    }
    return figures, table


def deltas(table: Table, turns: int) -> dict[str, Any]:
    """After a hundredth of the rows was touched: what has changed, against all of it."""
    random = np.random.default_rng(2)
    ids = table.image().ids
    smaller, faster = [], []
    for _ in range(turns):
        before = table.clock
        table.forget(before)  # as after a version: deltas are from here on
        touched = random.choice(ids, int(TOUCHED * len(ids)), replace=False)
        table.push(touched, np.ones((len(touched), DIM), np.float32))
        begun_s = time.perf_counter()
        delta = table.image(before)
        between_s = time.perf_counter()
        full = table.image()
        faster.append((time.perf_counter() - between_s) / (between_s - begun_s))
        smaller.append(full.num_bytes / delta.num_bytes)
        del full
    return {
        "delta_vs_full": round(min(statistics.median(smaller), statistics.median(faster)), 1),
        "delta_times_smaller": round(statistics.median(smaller), 1),
        "delta_times_faster": round(statistics.median(faster), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    deltas(grow(2 * GROWTH_BATCH)[1], turns=1)  # compiles, so that what follows does not
    num_rows, turns = (2_000_000, 3) if options.quick else (10_000_000, 7)
    figures, table = grow(num_rows)
    figures |= deltas(table, turns)
    del table
    rows, config = {}, {"quick": options.quick, "dim": DIM, "ids": NUM_IDS, "spread": {}}
    for name, rule in RULES.items():
        for speed in speeds(rule, BATCHES, turns):
            medians = {
                f"{what}_{who}": statistics.median(values)
                for what, by_name in (("pull", speed.pull), ("push", speed.push))
                for who, values in by_name.items()
                if values
            }
            figures |= {f"{name}_{key}_rows_per_s_{speed.rows}": round(value) for key, value in medians.items()}
            rows[f"{name}, {speed.rows}"] = tuple(
                f"{medians[key] / 1e6:.3f}" if key in medians else "-"
                for key in ("pull_ours", "pull_torch", "pull_twin", "push_ours", "push_torch", "push_twin")
            )
            config["spread"][f"{name}_{speed.rows}"] = median_and_spread(speed.push["ours"])
    head = ("million rows a second", "pull", "torch", "twin", "push", "torch", "twin")
    print(text_table(rows, head))
    finish("table", figures, config)


if __name__ == "__main__":
    main()
