"""One shard process over loopback: rows pulled and pushed a second, and how long one takes.

python -m benchmarks.sparse [--quick]

Rows are of 16 float32 with Adagrad, ids from a Zipf distribution over a million; a batch is drawn ahead, and counts the
distinct ids of as many draws as that takes. ``local`` is the default: each push is in the shard's log before it is
acknowledged, and the key is shown, but nothing encrypted, since worker and shard are on one machine. ``encrypted`` is
that as between two machines, and ``bare`` is without a key and a log. A single call waits for its answer; with several
in flight the next ones are on their way meanwhile. The full run has TensorFlow's ParameterServerStrategy pull and push
as many rows: it neither encrypts nor keeps a log. ``vs_tf_ps_SIZE`` is its time for a pull and a push, scheduled as its
guide has it, over ours, ``bare`` and with several in flight; ``vs_tf_ps`` is their geometric mean, ``encrypted`` that
of ours so, with a log, and ``fused`` where TensorFlow does many in one function.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import msgspec
import numpy as np

from benchmarks.accuracy_traces import table as text_table
from benchmarks.machine import REPOSITORY, finish, median_and_spread
from benchmarks.peers.envs import python_of
from shoal.comm.keys import JobKey
from shoal.shards.child import ShardProcess
from shoal.shards.client import Client
from shoal.shards.order import Order
from shoal.tables import Adagrad, TableSpec
from shoal.tables.buckets import BucketMap
from shoal.tables.frame import Part, Push

DIM, NUM_IDS = 16, 1_000_000
BATCHES = (500, 5_000, 100_000)
IN_FLIGHT = 3
Kind = Literal["local", "encrypted", "bare"]
KINDS: tuple[Kind, ...] = ("local", "encrypted", "bare")

Batch = tuple[np.ndarray, np.ndarray]


@dataclass
class Shard:
    """A client of a shard, and how far lane 0 is."""

    client: Client
    step: int = 0

    def push(self, batch: Batch) -> Any:
        self.step += 1
        return self.client.send(Push(1, {0: (self.step - 1, self.step)}, [Part("rows", *batch)]))


@contextmanager
def a_shard(kind: Kind) -> Iterator[Shard]:
    """One that holds a million rows."""
    with tempfile.TemporaryDirectory() as name, always_encrypted() if kind == "encrypted" else nullcontext():
        key = JobKey.make()
        key.write(Path(name) / "key")
        order = Order(name="s0", folder=name, shards=["s0"], key_path=str(Path(name) / "key"))
        if kind == "bare":
            order = msgspec.structs.replace(order, key_path="", durability="snapshot")
        process = ShardProcess(order)
        client = Client(key if kind != "bare" else None, BucketMap.even(["s0"]), {"s0": process.wait()})
        try:
            client.open([TableSpec(name="rows", dim=DIM, rule=Adagrad(lr=0.05))])
            shard = Shard(client)
            for start in range(0, NUM_IDS, 100_000):
                zeros = np.zeros((100_000, DIM), np.float32)
                client.settle(shard.push((np.arange(start, start + 100_000), zeros)))
            yield shard
        finally:
            client.close()
            process.close()


def always_encrypted() -> AbstractContextManager[Any]:
    return mock.patch.dict(os.environ, SHOAL_ENCRYPT="always")


def zipf_batches(num: int, size: int) -> list[Batch]:
    """Distinct ids in the order in which they are drawn, with gradients."""
    random = np.random.default_rng(size)
    scattered = random.permutation(NUM_IDS)
    found = []
    for _ in range(num):
        drawn = np.empty(0, np.int64)
        while len(drawn) < size:
            drawn = np.concatenate([drawn, random.zipf(1.2, 4 * size) - 1])
            drawn = drawn[drawn < NUM_IDS]
            _, first = np.unique(drawn, return_index=True)
            drawn = drawn[np.sort(first)]
        ids = np.ascontiguousarray(scattered[drawn[:size]])
        found.append((ids, random.standard_normal((size, DIM), dtype=np.float32)))
    return found


def singly(shard: Shard, batches: list[Batch], turns: int) -> tuple[list[float], list[float]]:
    """Seconds of pulls and pushes that wait for their answers, in turns."""
    pulls, pushes = [], []
    for turn in range(turns + 2):
        batch = batches[turn % len(batches)]
        begun_s = time.perf_counter()
        shard.client.pull("rows", batch[0])
        between_s = time.perf_counter()
        shard.client.settle(shard.push(batch))
        if turn > 1:
            pulls.append(between_s - begun_s)
            pushes.append(time.perf_counter() - between_s)
    return pulls, pushes


def in_flight(shard: Shard, batches: list[Batch], turns: int) -> tuple[float, float]:
    """Seconds of a pull and of a push with several in flight."""
    size = len(batches[0][0])
    begun_s = time.perf_counter()
    asked = [shard.client.ask("rows", batches[turn % len(batches)][0]) for turn in range(IN_FLIGHT)]
    for turn in range(turns):
        assert len(shard.client.rows(asked.pop(0))) == size
        asked.append(shard.client.ask("rows", batches[turn % len(batches)][0]))
    for pulling in asked:
        shard.client.rows(pulling)
    between_s = time.perf_counter()
    sent = []
    for turn in range(turns):
        sent.append(shard.push(batches[turn % len(batches)]))
        if len(sent) == IN_FLIGHT:
            shard.client.settle(sent.pop(0))
    for pushing in sent:
        shard.client.settle(pushing)
    ended_s = time.perf_counter()
    return (between_s - begun_s) / (turns + IN_FLIGHT), (ended_s - between_s) / turns


def against_tensorflow(figures: dict[str, Any]) -> dict[str, Any]:
    """How many times as long a pull and a push take it."""
    with tempfile.TemporaryDirectory() as name:
        words = [str(python_of("tensorflow")), "-m", "benchmarks.peers.with_tensorflow_ps", "all", name]
        said = subprocess.run(words, check=True, capture_output=True, text=True, cwd=REPOSITORY, timeout=600).stdout
    theirs = json.loads(said.strip().splitlines()[-1])
    found: dict[str, Any] = {f"tf_ps_{name}": round(value, 2) for name, value in theirs.items()}
    compared = (
        ("turn", "bare", "vs_tf_ps_fused"), ("scheduled", "bare", "vs_tf_ps"),
        ("scheduled", "local", "vs_tf_ps_local"), ("scheduled", "encrypted", "vs_tf_ps_encrypted"),
    )  # fmt: skip
    for how, ours, name in compared:
        ratios = []
        for size in BATCHES:
            rates = [figures[f"{ours}_{kind}_rows_per_s_{size}"] for kind in ("pull", "push")]
            ratios.append(theirs[f"{how}_{size}_ms"] / (1e3 * sum(size / rate for rate in rates)))
            found[f"{name}_{size}"] = round(ratios[-1], 2)
        found[name] = round(statistics.geometric_mean(ratios), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    rows, spread = {}, {}
    for name in KINDS:
        with a_shard(name) as shard:
            for size in BATCHES:
                batches = zipf_batches(3 if size > BATCHES[1] else 8, size)
                turns = {500: 1000, 5_000: 200, 100_000: 12}[size] // (2 if options.quick else 1)
                pulls, pushes = singly(shard, batches, turns)
                flying = in_flight(shard, batches, turns)
                pull_s, push_s = statistics.median(pulls), statistics.median(pushes)
                figures |= {
                    f"{name}_pull_{size}_ms": round(1e3 * pull_s, 3),
                    f"{name}_push_{size}_ms": round(1e3 * push_s, 3),
                    f"{name}_pull_rows_per_s_{size}": round(size / min(pull_s, flying[0])),
                    f"{name}_push_rows_per_s_{size}": round(size / min(push_s, flying[1])),
                }
                spread[f"{name}_{size}"] = {"pull": median_and_spread(pulls), "push": median_and_spread(pushes)}
                rows[f"{name}, {size}"] = (
                    f"{1e3 * pull_s:.3f}", f"{size / pull_s / 1e6:.2f}", f"{size / flying[0] / 1e6:.2f}",
                    f"{1e3 * push_s:.3f}", f"{size / push_s / 1e6:.2f}", f"{size / flying[1] / 1e6:.2f}",
                )  # fmt: skip
    figures |= {
        "pull_rows_per_s": figures["local_pull_rows_per_s_100000"],
        "push_rows_per_s": figures["local_push_rows_per_s_100000"],
        "pull_500_ms": figures["local_pull_500_ms"],
    }
    if not options.quick:
        figures |= against_tensorflow(figures)
    head = ("", "pull ms", "M rows/s", "in flight", "push ms", "M rows/s", "in flight")
    print(text_table(rows, head))
    finish("sparse", figures, {"quick": options.quick, "dim": DIM, "ids": NUM_IDS, "spread": spread})


if __name__ == "__main__":
    main()
