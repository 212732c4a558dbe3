"""Buckets that move while shards serve: nothing is lost, nothing is applied twice, no request fails."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

from shoal.errors import ConfigError
from shoal.shards import messages as msg
from shoal.shards import moving
from shoal.shards.child import ShardProcess
from shoal.shards.client import told_of
from shoal.shards.moving import move, rebalance
from shoal.tables import SGD, Adagrad, TableSpec
from shoal.tables.frame import Part, Push

SPECS = (
    TableSpec(name="counts", dim=2, rule=SGD(lr=1.0), initial_scale=0.0, admit_after=1),
    TableSpec(name="rare", dim=3, rule=Adagrad(lr=0.1), admit_after=3),
)
NUM_IDS = 3000
ALL = np.arange(NUM_IDS)


class Worker(threading.Thread):
    """Pushes one after another of its lane, and pulls between, until it is told to stop. ``pushed``: how often each id
    was; ``error``: what went wrong."""

    def __init__(self, cluster, lane, in_step):
        super().__init__()
        self.client = cluster.client(f"w{lane}")
        self.lane, self.in_step = lane, in_step
        self.stop_at, self.step = 1 << 60, 0
        self.pushed = np.zeros(NUM_IDS, np.int64)
        self.error: BaseException | None = None

    def run(self):
        try:
            self.client.open(SPECS)
            self.client.begin(1)
            random = np.random.default_rng(self.lane)
            while self.step < self.stop_at:
                self.client.pull("counts", ALL[::7], self.step if self.in_step else -1)
                ids = np.unique(random.integers(0, NUM_IDS, 200))
                parts = [Part("counts", ids, -np.ones((len(ids), 2), np.float32)),
                         Part("rare", ids, np.ones((len(ids), 3), np.float32))]  # fmt: skip
                self.client.settle(self.client.send(Push(1, {self.lane: (self.step, self.step + 1)}, parts)))
                self.pushed[ids] += 1
                self.step += 1
        except BaseException as error:  # noqa: BLE001
            self.error = error


@contextmanager
def under_load(cluster, in_step):
    """Two workers push meanwhile; after it what they pushed is there, once."""
    workers = [Worker(cluster, lane, in_step) for lane in range(2)]
    for worker in workers:
        worker.start()
    mover = cluster.client("mover")
    mover.open(SPECS)
    yield mover, workers
    last = max(worker.step for worker in workers) + 5
    for worker in workers:
        worker.stop_at = last
    for worker in workers:
        worker.join(60)
        assert worker.error is None and worker.step == last
    pushed = sum(worker.pushed for worker in workers)
    found = mover.pull("counts", ALL)
    np.testing.assert_array_equal(found, np.stack([pushed, pushed], 1).astype(np.float32))
    told = mover.standings()
    assert sum(standing.figures["table/counts"]["rows"] for standing in told.values()) == (pushed > 0).sum()


def wait_for(workers, steps):
    until = min(worker.step for worker in workers) + steps
    while min(worker.step for worker in workers) < until:
        for worker in workers:
            if worker.error is not None:
                raise worker.error
        threading.Event().wait(0.01)


@pytest.mark.parametrize("consistency", ["async", "sync", "bounded:2"])
def test_buckets_move_there_and_back_under_load(shards, consistency):
    cluster = shards(2, consistency=consistency, num_lanes=2)
    with under_load(cluster, consistency == "sync") as (mover, workers):
        wait_for(workers, 10)
        some = cluster.buckets.buckets("s0")[:300]
        done = move(mover, some, "s0", "s1", cluster.addresses)
        assert done.num_buckets == 300 and done.num_bytes > 0
        wait_for(workers, 10)
        move(mover, some[:100], "s1", "s0", cluster.addresses)
        wait_for(workers, 10)
        with pytest.raises(ConfigError, match="does not have all of these buckets"):
            move(mover, some[:1], "s1", "s0", cluster.addresses)
    assert [len(mover.buckets.buckets(name)) for name in ("s0", "s1")] == [1848, 2248]


@pytest.mark.parametrize("consistency", ["async", "sync"])
def test_a_shard_is_added_and_another_removed_under_load_and_those_that_are_killed_know_it(shards, consistency):
    cluster = shards(2, consistency=consistency, num_lanes=2)
    with under_load(cluster, consistency == "sync") as (mover, workers):
        wait_for(workers, 5)
        order = cluster.running["s0"].order
        third = ShardProcess(msgspec.structs.replace(order, name="s2", folder=order.folder.replace("s0", "s2")))
        cluster.running["s2"] = third
        addresses = {**cluster.addresses, "s2": third.wait()}
        moves = rebalance(mover, ["s0", "s1", "s2"], addresses)
        assert {done.to for done in moves} == {"s2"}
        assert [len(mover.buckets.buckets(name)) // 10 for name in ("s0", "s1", "s2")] == [136, 136, 136]
        wait_for(workers, 5)
        for name in ("s2", "s0"):
            cluster.kill(name)
            wait_for(workers, 5)
        rebalance(mover, ["s1", "s2"], {name: addresses[name] for name in ("s1", "s2")})
        assert mover.buckets.shards == ("s1", "s2")
        wait_for(workers, 5)


@pytest.mark.parametrize("killed", ["s0", "s1"], ids=["source", "target"])
def test_whichever_is_killed_when_buckets_change_hands_the_move_can_be_made_to_its_end(shards, killed):
    cluster = shards(2, num_lanes=1)
    client = cluster.client()
    client.open(SPECS)
    client.begin(1)

    def push(step):
        part = Part("counts", ALL, -np.ones((NUM_IDS, 2), np.float32))
        client.settle(client.send(Push(1, {0: (step, step + 1)}, [part])))

    push(0)
    some = cluster.buckets.buckets("s0")[:400]
    packed = moving._packed(some)
    told, body = client.tell("s0", msg.HandOver(packed, {}))
    client.tell("s1", msg.TakeIn("m", True), body)
    push(1)
    changed = told_of(client.buckets.moved(some, "s1"), cluster.addresses)
    client.tell("s0", msg.LetGo("m", packed, told.clocks, changed))
    cluster.kill(killed)
    told, body = client.tell("s0", msg.LetGo("m", packed, told.clocks, changed))
    for _ in range(2):
        client.tell("s1", msg.TakeOver("m", packed, changed, told.lengths), body)
    cluster.kill(killed)
    push(2)
    assert client.buckets.epoch == 2
    client.tell("s0", msg.Forget("m", packed))
    cluster.kill("s0")
    np.testing.assert_array_equal(client.pull("counts", ALL), np.full((NUM_IDS, 2), 3, np.float32))
