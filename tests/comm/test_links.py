from __future__ import annotations

import signal
import threading

import pytest
import zmq

from shoal.comm.keys import JobKey
from shoal.comm.link import Inbound, Link, Listener
from shoal.comm.messages import Ask, Leave, Stop, ToCoordinator, ToWorker, Welcome
from shoal.errors import ConfigError
from tests.comm.crew import LONG_S, forks, until


@pytest.fixture(name="key", scope="module")
def _key():
    return JobKey.make()


@pytest.fixture(name="listener")
def _listener(key):
    listener = Listener("127.0.0.1", 0, key, ToCoordinator)
    yield listener
    listener.close()


@pytest.fixture(name="call")
def _call(listener, key):
    links = []

    def call(name, key=key):
        links.append(Link(listener.address, key, name, ToWorker))
        return links[-1]

    yield call
    for link in links:
        link.close()


def next_from(listener):
    """The next messages that come."""
    came = []
    until(lambda: came.extend(listener.receive(0.2)[0]) or came)
    return came


def test_a_message_comes_with_its_senders_name_and_is_answered_by_it(listener, call):
    link = call("a")
    link.send(Stop(reason="because"))
    assert next_from(listener) == [Inbound("a", Stop(reason="because"))]
    listener.send("a", Welcome(coordinator="c", peers={"b": "host:1"}))
    assert link.receive(LONG_S) == [Welcome(coordinator="c", peers={"b": "host:1"})]


def test_messages_of_one_caller_keep_their_order(listener, call):
    link = call("a")
    for number in range(100):
        link.send(Stop(reason=str(number)))
    came = []
    until(lambda: came.extend(listener.receive(0.2)[0]) or len(came) == 100)
    assert [inbound.message.reason for inbound in came] == [str(number) for number in range(100)]


def test_a_stranger_with_another_key_is_refused_and_counted(listener, call):
    call("stranger", JobKey.make()).send(Leave())
    until(lambda: listener.receive(0.2) == ([], []) and listener.num_refused > 0)


def test_a_stranger_that_knows_the_public_half_is_refused_and_counted(listener, key):
    own = JobKey.make()
    thief = Link(listener.address, JobKey(key.public, own.secret), "thief", ToWorker)
    thief.send(Leave())
    until(lambda: listener.receive(0.2) == ([], []) and listener.num_refused > 0)
    thief.close()


def test_a_caller_without_encryption_is_refused_and_counted(listener):
    with zmq.Context() as context, context.socket(zmq.DEALER) as plain:
        plain.linger = 0
        plain.connect(f"tcp://{listener.address}")
        plain.send(b"hello")
        until(lambda: listener.receive(0.2) == ([], []) and listener.num_refused > 0)


def test_friends_come_in_while_a_stranger_knocks(listener, call):
    call("stranger", JobKey.make()).send(Leave())
    until(lambda: listener.receive(0.2) and listener.num_refused > 0)
    call("friend").send(Leave())
    assert next_from(listener) == [Inbound("friend", Leave())]


def test_what_does_not_decode_is_dropped_and_counted(listener, call):
    link = call("a")
    link.send({"type": "of another revision"})
    link.send(Welcome(coordinator="not for coordinators", peers={}))
    link.send(Leave())
    assert next_from(listener) == [Inbound("a", Leave())] and listener.num_undecodable == 2
    listener.send("a", Ask())
    listener.send("a", Welcome(coordinator="c", peers={}))
    until(lambda: link.receive(0.2))
    assert link.num_undecodable == 1


def test_a_caller_that_ends_is_noticed_after_its_last_message(listener, call, key):
    other = Link(listener.address, key, "b", ToWorker)
    call("a").send(Leave())
    other.send(Leave())
    other.close()
    came, ended = [], []
    until(lambda: [got.extend(new) for got, new in zip((came, ended), listener.receive(0.2), strict=True)] and ended)
    assert ended == ["b"] and Inbound("b", Leave()) in came


def beat_for_ever(address, key, line):
    link = Link(address, key, "w", ToWorker)
    link.send(Leave())
    line.recv()


def test_a_killed_process_is_noticed(listener, key):
    line, far = forks.Pipe()
    process = forks.Process(target=beat_for_ever, args=(listener.address, key, far), daemon=True)
    process.start()
    assert next_from(listener) == [Inbound("w", Leave())]
    process.kill()
    process.join()
    until(lambda: listener.receive(0.2)[1] == ["w"])
    assert process.exitcode == -signal.SIGKILL and not line.poll()


def test_a_descriptor_used_anew_is_not_taken_for_the_caller_that_had_it(listener):
    """The connections of a and b ended, both on descriptor 7, and both ends are read after b has spoken."""
    listener._note(7, "a")
    listener._note(7, "b")
    assert [listener._forget(7), listener._forget(7), listener._forget(7)] == ["a", "b", None]


def test_a_link_calls_until_someone_listens_and_again_when_it_is_replaced(key):
    first = Listener("127.0.0.1", 0, key, ToCoordinator)
    host, port = first.address.split(":")
    link = Link(first.address, key, "a", ToWorker)
    link.send(Leave())
    assert next_from(first)
    first.close()
    link.send(Stop(reason="while no one listened"))
    second = Listener(host, int(port), key, ToCoordinator)
    assert next_from(second) == [Inbound("a", Stop(reason="while no one listened"))]
    link.close()
    second.close()


def test_another_thread_ends_a_wait(call):
    link = call("a")
    waker = link.waker()
    waking = threading.Thread(target=waker.wake)
    waking.start()
    assert link.receive(LONG_S) == []
    waking.join()
    waker.close()


def test_a_port_in_use_says_so_and_leaves_nothing_behind(listener, key):
    host, port = listener.address.split(":")
    before = threading.active_count()
    with pytest.raises(ConfigError, match="is it in use"):
        Listener(host, int(port), key, ToCoordinator)
    assert threading.active_count() == before


def test_an_address_that_is_none_says_so(key):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Link("nowhere", key, "a", ToWorker)


def test_a_message_for_who_is_gone_is_dropped(listener):
    listener.send("nobody", Welcome(coordinator="c", peers={}))
    assert listener.receive(0.0) == ([], [])
