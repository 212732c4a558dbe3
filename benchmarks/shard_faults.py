"""Shards and workers killed at random: is every update applied exactly once, and how soon does training go on?

python -m benchmarks.shard_faults [--quick] [--seed N]

The job's gradients are sums without rounding, so under ``Sync`` (and ``Hybrid``) the tables of a run under faults must
have the very bits of one by one worker that nothing befell. Under ``Async`` a table counts: plain SGD at a rate of 1
adds 1 for each time that a sample is applied. And one push is sent twice, late, and by a zombie. Recovery is from a
kill to the end of the longest time without a commit that begins within a second of it. Tables are read from what the
shards left on disk. Strategies run with ``log`` and with ``replica``; there the folder of a killed shard is gone, too.
``--quick`` compares the tables of two ``Hybrid`` runs, under faults at other times, with one another.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy_traces import table as text_table
from benchmarks.machine import REPOSITORY, finish, median_and_spread
from benchmarks.trials import Trial, trial
from shoal.comm.keys import JobKey
from shoal.errors import Fault
from shoal.shards.child import ShardProcess
from shoal.shards.client import Client
from shoal.shards.order import Order
from shoal.shards.reading import stored_tables
from shoal.tables import SGD, TableSpec
from shoal.tables.book import Verdict
from shoal.tables.buckets import BucketMap
from shoal.tables.frame import Part, Push
from shoal.testing import FaultPlan

JOB = REPOSITORY / "tests" / "runs" / "tabled_by_name.py"
WORKERS, BATCH, STEP_S = 3, 32, 0.01
WITHIN_S = 1.0
FIRST_STEP = 20
DURABILITIES = ("log", "replica")
RUNS = [(strategy, durability) for durability in DURABILITIES for strategy in ("hybrid", "sync", "async")]
QUICK_RUNS = [("hybrid", "log"), ("hybrid", "replica")]
TABLES = ("users", "tags", "counts")


def draw(num_faults: int, apart: int, seed: int, durability: str) -> FaultPlan:
    """Workers and shards in turn, which of them and when by chance; with copies, a shard's folder goes with it."""
    chance = random.Random(seed)
    plan = FaultPlan()
    for number in range(num_faults):
        step = FIRST_STEP + number * apart + chance.randrange(apart // 2)
        if number % 2:
            plan = plan.kill(at_step=step, rank=chance.randrange(WORKERS))
        else:
            number = chance.randrange(2)
            lose = plan.lose_shard if durability == "replica" else plan.kill_shard
            plan = lose(at_step=step, number=number)
    return plan


def contents(done: Trial, steps: int) -> dict[str, dict[int, bytes]]:
    """Each table's rows, by id."""
    stored = stored_tables(done.run.path, steps)
    found: dict[str, dict[int, bytes]] = {}
    for name in TABLES:
        images = [table.image().by_id() for table in stored.tables(name)]
        found[name] = {
            int(i): row.tobytes()
            for image in images
            for i, row in zip(image.ids[image.counts > 0], image.rows, strict=True)
        }
    return found


def counts(tables: dict[str, dict[int, bytes]], samples: int) -> np.ndarray:
    """How often each sample was applied."""
    rows = tables["counts"]
    return np.array([-BATCH * np.frombuffer(rows[i], np.float32)[0] if i in rows else 0 for i in range(samples)])


def recoveries(done: Trial) -> list[float]:
    """Seconds from each kill to the end of the longest time without a commit that begins within a second of it."""
    times = [at_s for at_s, _ in done.commits]
    found = []
    for hit in done.inflicted:
        after = [t for t in times if t > hit.at_s]
        pairs = zip([hit.at_s, *after], after, strict=False)
        gaps = [(later - before, later) for before, later in pairs if before <= hit.at_s + WITHIN_S]
        found.append(max(gaps)[1] - hit.at_s if gaps else float("inf"))
    return found


def pushes_again() -> dict[str, bool]:
    """One push sent twice, late, and by a zombie, to a shard by itself: what is known of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        key = JobKey.make()
        key.write(folder / "key")
        shard = ShardProcess(Order(name="s0", folder=name, shards=["s0"], key_path=str(folder / "key")))
        client = Client(key, BucketMap.even(["s0"]), {"s0": shard.wait()})
        try:
            client.open([TableSpec(name="rows", dim=1, rule=SGD(lr=1.0), initial_scale=0.0)])
            one = np.arange(1)

            def push(generation: int, step: int) -> set[Verdict]:
                gradient = np.full((1, 1), -1.0, np.float32)
                return client.settle(
                    client.send(Push(generation, {0: (step, step + 1)}, [Part("rows", one, gradient)]))
                )

            first = [push(1, step) for step in range(3)] == [{Verdict.NEW}] * 3
            twice = push(1, 2) == {Verdict.KNOWN}
            late = push(1, 0) == {Verdict.KNOWN}
            client.begin(2)
            try:
                zombie = push(1, 3) == set()
            except Fault:
                zombie = True
            exact = first and float(client.pull("rows", one)[0, 0]) == 3.0
        finally:
            client.close()
            shard.close()
    return {"twice_is_known": twice, "late_is_known": late, "zombie_is_refused": zombie, "applied_once": exact}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shard_faults", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    num_faults, apart = (4, 30) if options.quick else (20, 40)
    runs = QUICK_RUNS if options.quick else RUNS
    steps = FIRST_STEP + (num_faults + 1) * apart
    samples = steps * BATCH
    env = {"TABLED_SAMPLES": samples, "TABLED_STEP_S": STEP_S}
    figures: dict[str, Any] = {"updates_lost": 0, "updates_repeated": 0, "bits_differ": 0, "kills": 0}
    rows, spread, waits = {}, {}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wanted: dict[str, dict[int, bytes]] = {}
        if not options.quick:
            calm = trial("calm", JOB, FaultPlan(), workers=1, folder=folder, **env, TABLED_STRATEGY="hybrid")
            wanted = contents(calm, steps)
        for number, (strategy, durability) in enumerate(runs):
            plan = draw(num_faults, apart, options.seed + number, durability)
            name = f"{strategy} {durability}"
            chosen = {**env, "TABLED_STRATEGY": strategy, "TABLED_DURABILITY": durability}
            done = trial(name.replace(" ", "-"), JOB, plan, workers=WORKERS, folder=folder, **chosen)
            found = contents(done, steps)
            wanted = wanted or found
            times = counts(found, samples)
            differ = sum(found[table] != wanted[table] for table in TABLES) if strategy != "async" else 0
            own = recoveries(done)
            lost, repeated = int((times < 0.5).sum()), int((times > 1.5).sum())
            rows[name] = (str(len(done.inflicted)), str(lost), str(repeated), str(differ), f"{max(own):.2f}")
            spread[name] = median_and_spread(own)
            waits += own
            for key, value in (("updates_lost", lost), ("updates_repeated", repeated), ("bits_differ", differ)):
                figures[key] += value
            figures["kills"] += len(done.inflicted)
    figures |= {"recovery_s": round(max(waits), 2), "recovery_median_s": round(statistics.median(waits), 2)}
    figures |= pushes_again()
    print(text_table(rows, ("", "kills", "lost", "repeated", "tables that differ", "longest recovery s")))
    config = {"quick": options.quick, "workers": WORKERS, "shards": 2, "runs": runs, "spread": spread}
    finish("shard_faults", figures, config, seed=options.seed)


if __name__ == "__main__":
    main()
