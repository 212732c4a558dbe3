from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from shoal.comm.keys import JobKey
from shoal.comm.link import Link, Listener
from shoal.comm.messages import Leave, ToCoordinator, ToWorker
from shoal.comm.transfer import Offerer, Parcel, fetch
from shoal.errors import ConfigError, Halted, LinkFault
from tests.comm.crew import LONG_S, forks, until

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture(name="key", scope="module")
def _key():
    return JobKey.make()


@pytest.fixture(name="offerer")
def _offerer(key):
    offerer = Offerer("127.0.0.1", key)
    yield offerer
    offerer.close()


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_tensors_of_every_kind_arrive_bit_for_bit(offerer, key):
    tensors = {f"{dtype}": torch.randn(3, 5).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "strided": torch.randn(6, 4).t()[::2]}
    offerer.offer("v7", Parcel(tensors, {"step": 7, "groups": [{"lr": 0.1}]}))
    parcel = fetch(offerer.address, key, "v7", LONG_S)
    assert same(dict(parcel.tensors), tensors) and parcel.meta == {"step": 7, "groups": [{"lr": 0.1}]}


def test_what_is_larger_than_many_chunks_arrives_whole(offerer, key):
    tensors = {"a": torch.randn(1_500_001), "b": torch.randn(2_000_003)}
    offerer.offer("big", Parcel(tensors, {}))
    assert same(dict(fetch(offerer.address, key, "big", LONG_S).tensors), tensors)


def test_several_fetch_at_once(offerer, key):
    tensors = {"a": torch.randn(1_000_000)}
    offerer.offer("v", Parcel(tensors, {}))
    got = []
    fetchers = [threading.Thread(target=lambda: got.append(fetch(offerer.address, key, "v", LONG_S))) for _ in range(3)]
    for fetcher in fetchers:
        fetcher.start()
    for fetcher in fetchers:
        fetcher.join()
    assert len(got) == 3 and all(same(dict(parcel.tensors), tensors) for parcel in got)


def test_who_asks_before_the_offer_waits_for_it(offerer, key):
    waits = threading.Event()
    got = []

    def cancelled():
        waits.set()
        return False

    fetcher = threading.Thread(target=lambda: got.append(fetch(offerer.address, key, "later", LONG_S, cancelled)))
    fetcher.start()
    waits.wait()
    offerer.offer("later", Parcel({"a": torch.ones(2)}, {}))
    fetcher.join()
    assert torch.equal(got[0].tensors["a"], torch.ones(2))


def test_what_is_never_offered_is_a_fault(offerer, key):
    with pytest.raises(LinkFault, match="sent nothing for"):
        fetch(offerer.address, key, "never", 0.2)


def test_another_jobs_key_gets_nothing(offerer):
    offerer.offer("v", Parcel({"a": torch.ones(2)}, {}))
    with pytest.raises(LinkFault):
        fetch(offerer.address, JobKey.make(), "v", 0.3)


def test_a_copy_of_no_more_use_is_given_up(offerer, key):
    with pytest.raises(Halted, match="of no more use"):
        fetch(offerer.address, key, "never", LONG_S, cancelled=lambda: True)


def test_the_last_two_offers_are_kept(offerer, key):
    for step in range(3):
        offerer.offer(str(step), Parcel({"a": torch.tensor(step)}, {}))
    assert fetch(offerer.address, key, "1", LONG_S).tensors["a"] == 1
    assert fetch(offerer.address, key, "2", LONG_S).tensors["a"] == 2
    with pytest.raises(LinkFault):
        fetch(offerer.address, key, "0", 0.2)


def test_an_address_of_another_host_cannot_be_listened_on(key):
    before = threading.active_count()
    with pytest.raises(ConfigError, match="address of this host"):
        Offerer("192.0.2.1", key)
    assert threading.active_count() == before


class Dying(Offerer):
    """Is killed as it is asked for the tenth time."""

    num_asked = 0

    def _answer(self, frames):
        self.num_asked += 1
        if self.num_asked == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._answer(frames)


def offer_and_die(key, line):
    offerer = Dying("127.0.0.1", key)
    offerer.offer("v", Parcel({"a": torch.zeros(50_000_000, dtype=torch.uint8)}, {}))
    line.send(offerer.address)
    signal.pause()


def test_a_source_that_dies_in_mid_transfer_is_a_fault(key):
    line, far = forks.Pipe()
    source = forks.Process(target=offer_and_die, args=(key, far), daemon=True)
    source.start()
    assert line.poll(LONG_S)
    with pytest.raises(LinkFault, match="cut off or frozen"):
        fetch(line.recv(), key, "v", 0.5)
    source.join()
    assert source.exitcode == -signal.SIGKILL


def test_heartbeats_pass_a_transfer_that_has_stopped_moving(offerer, key):
    """A fetch that no one reads fills its own connection and none else: control has its own."""
    offerer.offer("v", Parcel({"a": torch.zeros(64 << 20, dtype=torch.uint8)}, {}))
    listener = Listener("127.0.0.1", 0, key, ToCoordinator)
    link = Link(listener.address, key, "a", ToWorker)
    done = threading.Event()
    fetcher = threading.Thread(target=lambda: done.set() if fetch(offerer.address, key, "v", LONG_S) else None)
    fetcher.start()
    num_beats = 0
    while not done.is_set():
        link.send(Leave())
        came = []
        until(lambda came=came: came.extend(listener.receive(0.1)[0]) or came)
        num_beats += len(came)
    fetcher.join()
    link.close()
    listener.close()
    assert num_beats > 1
