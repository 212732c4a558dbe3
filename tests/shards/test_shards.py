"""Shards as processes: routing, what is applied once over kills and repeats, reads that wait, and what is refused."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from shoal.comm.keys import JobKey
from shoal.errors import ConfigError, Diverged, Fault, LinkFault
from shoal.shards.client import Client, Manner
from shoal.tables import Adagrad, Adam, TableSpec, kernels
from shoal.tables.batches import buckets_of, distinct, sums
from shoal.tables.book import Verdict
from shoal.tables.buckets import BucketMap
from shoal.tables.frame import Part, Push
from shoal.tables.table import Table

SPECS = (TableSpec(name="a", dim=3, rule=Adam(lr=0.1)), TableSpec(name="b", dim=2, rule=Adagrad(lr=0.1)))
ALL = np.arange(300)


def push_of(step, lane=0, generation=1):
    random = np.random.default_rng([step, lane])
    parts = []
    for spec in SPECS:
        ids = np.unique(random.integers(0, 300, 40))
        parts.append(Part(spec.name, ids, random.standard_normal((len(ids), spec.dim), dtype=np.float32)))
    return Push(generation, {lane: (step, step + 1)}, parts, now_s=step)


def plain(pushes):
    tables = {spec.name: Table(spec, 1 << 22) for spec in SPECS}
    for push in pushes:
        for part in push.parts:
            tables[part.table].push(part.ids, part.gradients, push.now_s)
    return {name: table.pull(ALL) for name, table in tables.items()}


def pulled(client):
    return {spec.name: client.pull(spec.name, ALL) for spec in SPECS}


def equal(one, other):
    for name, rows in one.items():
        np.testing.assert_array_equal(rows, other[name], name)


@pytest.mark.parametrize("num", [1, 3])
def test_what_is_pulled_is_what_was_pushed_whichever_shard_has_it(shards, num):
    client = shards(num).client()
    client.open(SPECS)
    equal(pulled(client), plain([]))
    pushes = [push_of(step) for step in range(5)]
    for push in pushes:
        assert client.settle(client.send(push)) == {Verdict.NEW}
    equal(pulled(client), plain(pushes))
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_array_equal(client.pull("a", order), plain(pushes)["a"][order])
    rows = [standing.figures["table/a"]["rows"] for standing in client.standings().values()]
    assert sum(rows) == len({int(i) for push in pushes for i in push.parts[0].ids}) and min(rows) > 0


def test_rows_travel_as_bfloat16_where_that_is_asked_for(shards):
    cluster = shards(2)
    full, half = cluster.client(), cluster.client(manner=Manner(half=True))
    full.open(SPECS)
    half.open(SPECS)
    full.settle(full.send(push_of(0)))
    exact, short = full.pull("a", ALL), half.pull("a", ALL)
    assert not np.array_equal(exact, short)
    np.testing.assert_allclose(short, exact, rtol=2**-8)
    assert not (short.view(np.uint32) & 0xFFFF).any()


def test_killed_shards_lose_nothing_and_what_is_sent_again_is_applied_once(shards):
    cluster = shards(2)
    client = cluster.client()
    client.open(SPECS)
    pushes = [push_of(step) for step in range(40)]
    found = []
    for number, push in enumerate(pushes):
        pushing = client.send(push)
        if number % 10 == 3:
            cluster.kill(cluster.names[number // 10 % 2])
        found += client.settle(pushing)
        if number % 10 == 7:
            assert client.settle(client.send(push)) == {Verdict.KNOWN}
            assert client.settle(client.send(pushes[number - 2])) == {Verdict.KNOWN}
    assert Verdict.NEW in found
    equal(pulled(client), plain(pushes))


def test_a_read_of_a_step_waits_for_all_lanes_of_the_steps_before(shards):
    cluster = shards(2, consistency="sync", num_lanes=2)
    one, two = cluster.client("w1"), cluster.client("w2")
    one.open(SPECS)
    two.open(SPECS)
    one.begin(1)
    two.begin(1)
    one.settle(one.send(push_of(0, lane=0)))
    waiting = one.ask("a", ALL, 1)
    with pytest.raises(LinkFault, match="did not answer within"):
        one._calls.wait(next(iter(waiting.tickets.values())), 0.3)
    np.testing.assert_array_equal(two.pull("a", ALL, 0), plain([])["a"])
    two.settle(two.send(push_of(0, lane=1)))
    parts = [push_of(0, lane).parts[0] for lane in (0, 1)]
    ids, inverse = distinct(np.concatenate([part.ids for part in parts]))
    summed = sums(np.concatenate([part.gradients for part in parts]), inverse, len(ids))
    table = Table(SPECS[0], 1 << 22)
    table.push(ids, summed)
    np.testing.assert_array_equal(one.rows(waiting), table.pull(ALL))


def test_a_bounded_read_is_answered_once_the_slowest_is_near_enough(shards):
    cluster = shards(1, consistency="bounded:1", num_lanes=2)
    fast, slow = cluster.client("fast"), cluster.client("slow")
    fast.open(SPECS)
    slow.open(SPECS)
    for step in range(2):
        fast.settle(fast.send(push_of(step, lane=0)))
    waited_s = []

    def read():
        begun_s = time.monotonic()
        fast.pull("a", ALL, 2)
        waited_s.append(time.monotonic() - begun_s)

    reader = threading.Thread(target=read)
    reader.start()
    reader.join(0.4)
    assert reader.is_alive()
    slow.settle(slow.send(push_of(0, lane=1)))
    reader.join(20)
    assert waited_s and fast.staleness == {1: 1}


def test_a_zombie_and_a_push_with_a_gap_are_refused(shards):
    client = shards(2).client()
    client.open(SPECS)
    client.begin(2)
    with pytest.raises(Fault, match="generation 1 is over"):
        client.settle(client.send(push_of(0)))
    with pytest.raises(Fault, match=r"lane 0 from step 1 to 2 does not continue what shard s\d has"):
        client.settle(client.send(push_of(1, generation=2)))
    with pytest.raises(Fault, match="generation 1 is over"):
        client.begin(1)
    assert client.settle(client.send(push_of(0, generation=2))) == {Verdict.NEW}
    assert sum(standing.figures["zombies"] for standing in client.standings().values()) > 0


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (Part("nobody", ALL, np.ones((300, 3), np.float32)), ConfigError, "no table 'nobody'"),
        (Part("a", ALL, np.ones((300, 2), np.float32)), ConfigError, r"gradients must be float32 of shape \(\d+, 3\)"),
        (Part("a", ALL, np.full((300, 3), np.nan, np.float32)), Diverged, r"not finite.*worker w7, lanes \[0\]"),
    ],
    ids=["table", "width", "nan"],
)
def test_a_push_that_cannot_be_is_refused_and_the_shard_stays(shards, part, kind, message):
    client = shards(1).client("w7")
    client.open(SPECS)
    with pytest.raises(kind, match=message):
        client.settle(client.send(Push(1, {0: (0, 1)}, [part])))
    assert client.settle(client.send(push_of(0))) == {Verdict.NEW}


def test_two_tables_of_one_name_are_refused(shards):
    client = shards(1).client()
    with pytest.raises(ConfigError, match="there is no table 'a'"):
        client.pull("a", ALL)
    client.open(SPECS)
    with pytest.raises(ConfigError, match="two tables are called a"):
        client.open([TableSpec(name="a", dim=4)])
    with pytest.raises(ConfigError, match="not c"):
        client.open([TableSpec(name="c", dim=4)])


def test_without_the_jobs_key_nobody_is_heard(shards):
    cluster = shards(1)
    stranger = Client(JobKey.make(), cluster.buckets, cluster.addresses, manner=Manner(patience_s=0.5))
    with pytest.raises(LinkFault, match="did not answer within"):
        stranger.open(SPECS)
    stranger.close()


def test_buckets_are_dealt_evenly_and_move_no_more_than_they_must():
    two = BucketMap.even(["a", "b"])
    assert [len(two.buckets(name)) for name in "ab"] == [2048, 2048]
    moves = two.moves_for(["a", "b", "c"])
    moved = {source: sum(map(len, to.values())) for source, to in moves.items()}
    assert abs(moved["a"] - 683) <= 1 and abs(moved["b"] - 683) <= 1
    three = two
    for to in moves.values():
        for name, buckets in to.items():
            three = three.moved(buckets, name)
    assert [len(three.buckets(name)) // 10 for name in "abc"] == [136, 136, 136]
    gone = three.moves_for(["a", "c"])
    assert set(gone) == {"b"} and sum(map(len, gone["b"].values())) == len(three.buckets("b"))
    hot = {bucket: 100.0 if bucket < 20 else 1.0 for bucket in range(4096)}
    relief = two.moves_for(["a", "b"], hot)
    assert set(relief) == {"a"} and set(relief["a"]) == {"b"}


def test_the_ids_of_a_shard_are_spread_over_all_places_of_its_index():
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 100_000)
    buckets = buckets_of(ids)
    assert buckets.min() >= 0 and buckets.max() < 4096
    for own in (buckets < 1024, buckets >= 3072):
        homes = np.array([kernels._home(int(i), 1000) for i in ids[own]])
        assert np.histogram(homes, 10, (0, 1000))[0].min() > 0.8 * len(homes) / 10
