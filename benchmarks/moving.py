"""Buckets that move, a shard that comes and one that goes, while workers push and pull: how long does anyone wait?

python -m benchmarks.moving [--quick]

Two shards hold a million rows of 16; two workers, processes of their own, each push and pull a thousand ids at a time,
asynchronously, and count what they pushed. One bucket moves; a third shard joins and gets a third of all; then the
first one leaves. ``pause_ms`` is the longest time in which nobody served a bucket that moved; ``longest_request_ms``
the longest that a worker waited for anything. At the end the table must hold each update once: plain SGD at a rate of 1
counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.accuracy_traces import table as text_table
from benchmarks.machine import REPOSITORY, finish
from shoal.comm.keys import JobKey
from shoal.shards.child import ShardProcess
from shoal.shards.client import Client
from shoal.shards.moving import Move, move, rebalance
from shoal.shards.order import Order
from shoal.tables import SGD, TableSpec
from shoal.tables.buckets import BucketMap
from shoal.tables.frame import Part, Push

DIM, BATCH, WORKERS = 16, 1000, 2
SPEC = TableSpec(name="counts", dim=DIM, rule=SGD(lr=1.0), initial_scale=0.0)


def worker(lane: int, num_ids: int, folder: Path) -> None:
    """Push and pull until a file says stop; then tell what was pushed and how long things took."""
    key = JobKey.read(folder / "key")
    addresses = json.loads((folder / "addresses").read_text())
    client = Client(key, BucketMap.even(sorted(addresses)), addresses, worker=f"w{lane}")
    client.open([SPEC])
    random, pushed, failed = np.random.default_rng(lane), np.zeros(num_ids, np.int32), 0
    longest = [0.0, 0.0]
    step = 0
    while not (folder / "stop").exists():
        ids = np.unique(random.integers(0, num_ids, BATCH))
        begun_s = time.perf_counter()
        try:
            client.pull("counts", ids)
            between_s = time.perf_counter()
            push = Push(1, {lane: (step, step + 1)}, [Part("counts", ids, -np.ones((len(ids), DIM), np.float32))])
            client.settle(client.send(push))
        except Exception as error:  # noqa: BLE001 - counted
            print(f"worker {lane}: {error!r}", file=sys.stderr)
            failed += 1
            break
        longest = [max(longest[0], between_s - begun_s), max(longest[1], time.perf_counter() - between_s)]
        pushed[ids] += 1
        step += 1
        if step == 20:  # what compiles has compiled
            longest = [0.0, 0.0]
    np.save(folder / f"pushed-{lane}.npy", pushed)
    (folder / f"told-{lane}").write_text(json.dumps({"failed": failed, "steps": step, "longest_s": longest}))
    client.close()


def disturb(client: Client, folder: Path, running: dict[str, ShardProcess]) -> dict[str, list[Move]]:
    """One bucket moves, a shard comes, a shard goes."""
    addresses = {name: shard.address for name, shard in running.items()}
    time.sleep(2)
    one = [move(client, client.buckets.buckets("s0")[:1], "s0", "s1", addresses)]
    time.sleep(1)
    order = msgspec.structs.replace(running["s0"].order, name="s2", folder=str(folder / "s2"))
    running["s2"] = ShardProcess(order)
    addresses["s2"] = running["s2"].wait()
    added = rebalance(client, ["s0", "s1", "s2"], addresses)
    time.sleep(1)
    removed = rebalance(client, ["s1", "s2"], {name: addresses[name] for name in ("s1", "s2")})
    time.sleep(1)
    return {"one bucket": one, "a shard is added": added, "a shard is removed": removed}


def measure(num_ids: int, *, quick: bool) -> tuple[dict[str, list[Move]], list[dict[str, Any]], Any, Any]:
    """The moves, what the workers tell, what they pushed of each id, and what the table has of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = JobKey.make()
        key.write(folder / "key")
        running: dict[str, ShardProcess] = {}
        workers = []
        try:
            for shard in ("s0", "s1"):
                order = Order(name=shard, folder=str(folder / shard), shards=["s0", "s1"], key_path=str(folder / "key"),
                              num_lanes=WORKERS + 1)  # fmt: skip
                running[shard] = ShardProcess(order)
            addresses = {shard: process.wait() for shard, process in running.items()}
            (folder / "addresses").write_text(json.dumps(addresses))
            client = Client(key, BucketMap.even(["s0", "s1"]), addresses, worker="mover")
            client.open([SPEC])
            for step, ids in enumerate(np.array_split(np.arange(num_ids), num_ids // 50_000)):
                zeros = np.zeros((len(ids), DIM), np.float32)
                client.settle(client.send(Push(1, {WORKERS: (step, step + 1)}, [Part("counts", ids, zeros)])))
            words = [sys.executable, "-m", "benchmarks.moving", *(["--quick"] if quick else [])]
            workers = [
                subprocess.Popen([*words, "--worker", str(lane), "--folder", name], cwd=REPOSITORY)
                for lane in range(WORKERS)
            ]
            moves = disturb(client, folder, running)
            (folder / "stop").touch()
            for process in workers:
                process.wait(30)
            pushed = sum(np.load(folder / f"pushed-{lane}.npy") for lane in range(WORKERS))
            told = [json.loads((folder / f"told-{lane}").read_text()) for lane in range(WORKERS)]
            counts = client.pull("counts", np.arange(num_ids))[:, 0]
            client.close()
        finally:
            for process in workers:
                process.kill()
                process.wait()
            for shard_process in running.values():
                shard_process.close()
    return moves, told, pushed, counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moving", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", type=int)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    num_ids = 200_000 if options.quick else 1_000_000
    if options.worker is not None:
        worker(options.worker, num_ids, options.folder)
        return
    moves, told, pushed, counts = measure(num_ids, quick=options.quick)
    every = [one for several in moves.values() for one in several]
    figures: dict[str, Any] = {
        "failed_requests": sum(one["failed"] for one in told),
        "updates_lost": int((counts < pushed).sum()),
        "updates_repeated": int((counts > pushed).sum()),
        "pause_ms": round(1e3 * max(one.pause_s for one in every), 2),
        "longest_request_ms": round(1e3 * max(max(one["longest_s"]) for one in told), 1),
        "moved_buckets": sum(one.num_buckets for one in every),
        "moved_mb": round(sum(one.num_bytes for one in every) / 1e6, 1),
        "requests": 2 * sum(one["steps"] for one in told),
    }
    rows = {
        what: (str(sum(one.num_buckets for one in several)), f"{sum(one.num_bytes for one in several) / 1e6:.1f}",
               f"{1e3 * max(one.pause_s for one in several):.1f}")
        for what, several in moves.items()
    }  # fmt: skip
    print(text_table(rows, ("", "buckets", "MB", "longest pause ms")))
    finish("moving", figures, {"quick": options.quick, "ids": num_ids, "dim": DIM, "batch": BATCH})


if __name__ == "__main__":
    main()
