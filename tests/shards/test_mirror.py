"""A second shard has what the first has acknowledged: a disk that is lost loses nothing, and no zombie writes."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress

import pytest

from shoal.errors import Behind, ConfigError, Fault, StoreFault
from shoal.shards import messages as msg
from shoal.shards.child import ShardProcess
from shoal.shards.client import Client, Manner
from shoal.shards.copies import Copies, listing
from shoal.shards.moving import rebalance
from shoal.shards.order import Order
from shoal.tables.book import Verdict

from .test_moving import under_load, wait_for
from .test_shards import SPECS, equal, plain, pulled, push_of


def settled(client, step):
    return client.settle(client.send(push_of(step)))


@pytest.mark.parametrize("consistency", ["async", "sync"])
def test_a_disk_that_is_lost_loses_nothing_that_was_acknowledged(shards, consistency):
    cluster = shards(3, durability="replica", consistency=consistency)
    client = cluster.client()
    client.open(SPECS)
    client.begin(1)
    for step in range(12):
        assert settled(client, step) == {Verdict.NEW}
        if step in (3, 7):
            client.mark(step + 1, [step + 1])
        if step % 4 == 1:
            cluster.kill(f"s{step % 3}", with_disk=True)
            client.meet(f"s{step % 3}", cluster.addresses[f"s{step % 3}"])
            assert settled(client, step) == {Verdict.KNOWN}
    equal(pulled(client), plain([push_of(step) for step in range(12)]))
    figures = [standing.figures for standing in client.standings().values()]
    assert all(one["restored_bytes"] > 0 for one in figures)  # steps 1, 5 and 9: each shard once
    client.begin(2, 8 if consistency == "async" else 12)


def test_a_copy_is_what_it_is_a_copy_of_byte_for_byte(shards, tmp_path):
    cluster = shards(2, durability="replica")
    client = cluster.client()
    client.open(SPECS)
    for step in range(5):
        settled(client, step)
        client.mark(step + 1)
    cluster.kill("s1")  # its standby is as it was
    settled(client, 5)
    client.mark(6)
    own, copy = cluster.folder / "s0", cluster.folder / "s1" / "copies" / "s0"
    assert listing(own) == listing(copy) and "marks.json" in listing(own)
    assert (own / "term").read_text() == (copy / "term").read_text()


def test_each_who_takes_a_shards_place_has_a_term_of_its_own_above_those_before(shards):
    cluster = shards(2, durability="replica")
    client = cluster.client()
    client.open(SPECS)
    terms = []
    for step in range(3):
        settled(client, step)
        terms.append(int((cluster.folder / "s1" / "term").read_text()))
        cluster.kill("s1")
    assert terms[0] < terms[1] < terms[2] and terms[1] - terms[0] != 1


def test_nothing_is_acknowledged_while_the_standby_is_away_and_all_of_it_afterwards(shards):
    cluster = shards(2, durability="replica")
    client = cluster.client(manner=Manner(patience_s=60.0))
    client.open(SPECS)
    settled(client, 0)
    cluster.running["s1"].kill()
    impatient = cluster.client("w1", manner=Manner(patience_s=0.5))
    pushing = client.send(push_of(1))
    with pytest.raises(Fault, match="did not answer"):
        impatient.tell("s0", msg.Begin(1, 1, 0))
    done = threading.Event()
    thread = threading.Thread(target=lambda: (client.settle(pushing), done.set()))
    thread.start()
    time.sleep(0.3)
    assert not done.is_set()
    cluster.running["s1"] = cluster.running["s1"].replaced()
    cluster.running["s1"].wait()
    cluster._tell()
    thread.join(60)
    assert done.is_set()
    equal(pulled(client), plain([push_of(0), push_of(1)]))


def test_a_standby_whose_disk_is_full_has_pushes_refused_with_the_reason_until_there_is_room(
    small_disk, shards, tmp_path
):
    disk = small_disk("1m")
    copies = tmp_path / "0" / "s1" / "copies"
    copies.parent.mkdir(parents=True)
    copies.symlink_to(disk)
    cluster = shards(2, durability="replica")
    client = cluster.client()
    client.open(SPECS)
    settled(client, 0)
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    refused, reason = next((step, why) for step in range(1, 1000) if (why := refusal(client, step)))
    assert re.search(r"s0.* could not be written: .*No space left on device", reason)
    filler.unlink()
    while refusal(client, refused):  # the standby is asked once a second
        time.sleep(0.05)
    assert client.standings()["s0"].figures["standby_trouble"] == ""
    equal(pulled(client), plain([push_of(step) for step in range(refused + 1)]))
    assert listing(cluster.folder / "s0") == listing(disk / "s0")


def refusal(client, step):
    """Why a push is not kept; empty if it is."""
    try:
        settled(client, step)
    except StoreFault as error:
        return str(error)
    return ""


def test_a_process_that_has_been_replaced_ends_when_it_hears_of_it(shards, tmp_path):
    cluster = shards(2, durability="replica")
    client = cluster.client()
    client.open(SPECS)
    settled(client, 0)
    elsewhere = Order(
        name="s0", folder=str(tmp_path / "elsewhere"), shards=cluster.names, durability="replica",
        key_path=str(cluster.folder / "key"), memory_bytes=1 << 24,
    )  # fmt: skip
    another = ShardProcess(elsewhere)
    try:
        addresses = cluster.addresses | {"s0": another.wait()}
        another.tell(addresses)
        cluster.running["s1"].tell(addresses)
        newer = Client(cluster.key, cluster.buckets, addresses)
        try:
            newer.open(SPECS)
            assert settled(newer, 0) == {Verdict.KNOWN}
            assert newer.standings()["s0"].figures["restored_bytes"] > 0
            zombie = cluster.client("w1", manner=Manner(patience_s=1.0))
            with pytest.raises(Fault, match=r"s0 at .* did not answer"):
                zombie.tell("s0", msg.Begin(1, 2, 0))
            assert cluster.running["s0"].ended() == 1
            assert settled(newer, 1) == {Verdict.NEW}
        finally:
            newer.close()
    finally:
        another.close()


def test_moves_and_lost_disks_go_together(shards):
    cluster = shards(2, durability="replica")
    with under_load(cluster, in_step=False) as (client, workers):
        wait_for(workers, 10)
        rebalance(client, ["s0"], cluster.addresses)
        cluster.kill("s0", with_disk=True)
        client.meet("s0", cluster.addresses["s0"])
        wait_for(workers, 10)
        rebalance(client, ["s0", "s1"], cluster.addresses)


def test_what_is_no_copy_is_refused(tmp_path):
    copies = Copies(tmp_path)
    with pytest.raises(Behind, match="nothing of shard s1"):
        copies.write(msg.Copy("s1", 1, 1, [msg.Change("log-0", "write", 0, 1)]), b"x")
    assert copies.look(msg.Look("s1", 2)).term == 0
    with pytest.raises(Fault, match="taken the place of shard s1: this one's term is 1, not 2"):
        copies.write(msg.Copy("s1", 1, 2, [msg.Change("log-0", "write", 0, 1)]), b"x")
    with pytest.raises(Fault, match="taken the place"):
        copies.look(msg.Look("s1", 1))
    copies.write(msg.Copy("s1", 2, 3, [msg.Change("log-0", "write", 0, 3)]), b"abc")
    for _ in range(2):  # what is asked twice is done once
        whole = [msg.Change("map", "whole", 0, 2), msg.Change("map", "done", 2, 0), msg.Change("log-0", "gone", 0, 0)]
        copies.write(msg.Copy("s1", 2, 4, whole), b"de")
    assert list(copies.look(msg.Look("s1", 0)).files) == ["map"]
    assert copies.read(msg.Fetch("s1", "map", 1)) == b"e"
    for name in ("../map", "/etc/hostname", ".", "a/../../b"):
        with pytest.raises(ConfigError, match="no name of a shard or of its files"):
            copies.write(msg.Copy("s1", 2, 5, [msg.Change(name, "write", 0, 1)]), b"x")
    with pytest.raises(ConfigError, match="no name"):
        copies.look(msg.Look("../s1", 0))
    with pytest.raises(StoreFault, match="cannot be read"):
        copies.read(msg.Fetch("s1", "other", 0))


def test_changes_that_come_twice_and_late_leave_what_was_sent(tmp_path):
    sent = [
        ([msg.Change("log-0", "write", 0, 4)], b"1111"),
        ([msg.Change("log-0", "write", 4, 4)], b"2222"),
        ([msg.Change("snapshot-1", "whole", 0, 4)], b"aaaa"),
        ([msg.Change("snapshot-1", "whole", 4, 4), msg.Change("snapshot-1", "done", 8, 0)], b"bbbb"),
        ([msg.Change("log-0", "write", 8, 4)], b"3333"),
    ]
    copies = Copies(tmp_path)
    copies.look(msg.Look("s0", 1))
    for last in range(len(sent)):
        for number in [*range(last + 1), *range(last, -1, -1)]:
            copies.write(msg.Copy("s0", 1, number + 1, sent[number][0]), sent[number][1])
    again = Copies(tmp_path)  # in the standby's place; what it had not answered is asked again
    for number in range(1, len(sent)):
        again.write(msg.Copy("s0", 1, number + 1, sent[number][0]), sent[number][1])
    assert again.read(msg.Fetch("s0", "log-0", 0)) == b"111122223333"
    assert again.read(msg.Fetch("s0", "snapshot-1", 0)) == b"aaaabbbb"
