from __future__ import annotations

import os
import pickle
import signal
import socket
import threading

import pytest
import torch

from shoal.comm.collectives import Group, Seat, Work
from shoal.comm.meeting import Meeting
from shoal.comm.sockets import can_find_sockets, shut_down, tcp_sockets
from shoal.errors import Fault, Halted
from tests.comm.crew import LONG_S, Crew

linux = pytest.mark.skipif(not can_find_sockets(), reason="the sockets of a process are found on Linux only")


# What members do


def add_up(group, line):
    tensor = torch.arange(10_000, dtype=torch.float32) * (group.seat.rank + 1) / 7
    group.all_reduce(tensor).wait()
    return tensor.numpy().tobytes()


def add_up_a_little(group, line):
    """Sums of few bytes, all under way at once, beside a large one: of every kind and shape."""
    rank = group.seat.rank
    tensors = [
        torch.tensor([1 / (rank + 3), 1e16, -1e16 * (rank == 0)], dtype=torch.float64),
        torch.full((300_000,), float(rank)),
        torch.tensor([2**62 + rank], dtype=torch.int64),
        torch.arange(12, dtype=torch.float32).view(3, 4).t() / (rank + 1),
        torch.tensor(rank == 1, dtype=torch.uint8),
        torch.full((5,), 0.1 * rank, dtype=torch.bfloat16),
    ]
    works = [group.all_reduce(tensor) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    return [(tensor.shape, tensor.tolist()) for tensor in tensors]


def gather(group, line):
    return group.all_gather(b"x" * (group.seat.rank * 1000) + bytes([group.seat.rank]) * (group.seat.rank % 2))


def wait_for_all(group, line):
    """No member ends its group while another still forms or uses it."""
    group.all_reduce(torch.ones(1)).wait()
    line.send(("ready", None))
    line.recv()


def count_bytes(group, line):
    before = group.traffic()
    for _ in range(5):
        group.all_reduce(torch.ones(1_000_000)).wait()
    group.all_gather(b"")
    raw, after = group.raw_bytes, group.traffic()
    wait_for_all(group, line)
    return raw, after.sent_bytes - before.sent_bytes, after.received_bytes - before.received_bytes


def reduce_until_it_fails(group, line):
    """Collectives without end; the error is the result."""
    line.send(("reducing", None))
    try:
        while True:
            group.all_reduce(torch.ones(500_000)).wait()
    except Fault as error:
        return error


def reduce_until_aborted(group, line):
    """Abort when told to, from another thread, while the loop is in a collective."""

    def abort_when_told():
        line.recv()
        group.abort()

    threading.Thread(target=abort_when_told, daemon=True).start()
    return reduce_until_it_fails(group, line)


def refuse_after_abort(group, line):
    wait_for_all(group, line)
    group.abort()
    errors = []
    for attempt in (lambda: group.all_reduce(torch.ones(1)), lambda: group.all_gather(b""), group.check):
        try:
            attempt()
        except Halted as error:
            errors.append(error)
    return len(errors), group.aborted


def count_what_is_open(group, line):
    wait_for_all(group, line)
    formed = len(tcp_sockets()), len(os.listdir("/proc/self/task"))
    group.close()
    group.close()
    return formed, (len(tcp_sockets()), len(os.listdir("/proc/self/task")))


# Tests


def let_go(crew):
    """What members return that ``wait_for_all``."""
    for rank in range(len(crew.lines)):
        crew.says(rank, "formed")
        crew.says(rank, "ready")
    for line in crew.lines:
        line.send("go")
    return [crew.says(rank, "returned") for rank in range(len(crew.lines))]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sums_are_right_and_the_same_bits_on_every_member(world_size):
    with Crew(world_size, add_up) as crew:
        results = crew.results()
    assert len(set(results)) == 1
    total = torch.frombuffer(bytearray(results[0]), dtype=torch.float32)
    share = sum(rank + 1 for rank in range(world_size)) / 7
    torch.testing.assert_close(total, torch.arange(10_000, dtype=torch.float32) * share)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_small_sums_are_those_in_order_of_rank_on_every_member(world_size):
    with Crew(world_size, add_up_a_little) as crew:
        results = crew.results()
    assert all(result == results[0] for result in results)
    fine, large, whole, turned, one, coarse = (values for _, values in results[0])
    in_order = [0.0, 0.0, 0.0]
    for rank in range(world_size):
        in_order = [a + b for a, b in zip(in_order, [1 / (rank + 3), 1e16, -1e16 * (rank == 0)], strict=True)]
    assert fine == in_order and large == [sum(range(world_size))] * 300_000
    assert whole == [(world_size * 2**62 + sum(range(world_size)) + 2**63) % 2**64 - 2**63] and one == (world_size > 1)
    assert results[0][3][0] == (4, 3) and turned[1][2] == pytest.approx(9 * sum(1 / (r + 1) for r in range(world_size)))
    assert coarse[0] == pytest.approx(0.1 * sum(range(world_size)), rel=0.02)


def test_payloads_of_any_size_come_to_all_by_rank():
    with Crew(3, gather) as crew:
        results = crew.results()
    assert results == [[b"", b"x" * 1000 + b"\1", b"x" * 2000]] * 3


@linux
def test_the_kernel_counts_the_bytes_that_a_ring_needs():
    with Crew(2, count_bytes) as crew:
        for raw, sent, received in let_go(crew):
            assert raw == 5 * 4_000_000 + 2 * 8
            assert sent == pytest.approx(raw, rel=0.03) and received == pytest.approx(raw, rel=0.03)


def test_a_killed_peer_makes_every_other_members_collective_fail():
    with Crew(3, reduce_until_it_fails) as crew:
        for rank in range(3):
            crew.says(rank, "formed")
            crew.says(rank, "reducing")
        crew.signal(1, signal.SIGKILL)
        for rank in (0, 2):
            error = crew.says(rank, "returned")
            assert isinstance(error, Fault) and not isinstance(error, Halted)
            assert error.rank == rank and error.generation == 1


@linux
def test_an_abort_ends_a_collective_that_waits_for_a_frozen_peer():
    with Crew(3, reduce_until_aborted) as crew:
        for rank in range(3):
            crew.says(rank, "formed")
            crew.says(rank, "reducing")
        crew.signal(1, signal.SIGSTOP)
        for rank in (0, 2):
            crew.lines[rank].send("abort")
            assert isinstance(crew.says(rank, "returned"), Fault)


@linux
def test_one_members_abort_reaches_the_others():
    with Crew(3, reduce_until_aborted) as crew:
        for rank in range(3):
            crew.says(rank, "formed")
            crew.says(rank, "reducing")
        crew.lines[0].send("abort")
        assert isinstance(crew.says(0, "returned"), Halted)
        assert all(type(crew.says(rank, "returned")) is Fault for rank in (1, 2))


def test_nothing_can_be_started_after_an_abort():
    with Crew(2, refuse_after_abort) as crew:
        assert let_go(crew) == [(3, True)] * 2


class Forgotten:
    """A collective whose error gloo has lost: it never ends, and a wait for it only times out."""

    def wait(self, timeout):
        raise RuntimeError("Operation timed out!")

    def is_completed(self):
        return False


def test_an_abort_ends_the_wait_for_a_collective_that_gloo_forgot():
    """One abort in some hundred hit a collective as it began, and both sides waited for the whole time-out."""
    group = Group.form(Seat(1, 0, 1), Meeting(1, lambda key, value: None, timeout_s=0.0))
    waiting = Work(group, Forgotten())
    aborter = threading.Timer(0.05, group.abort)
    aborter.start()
    with pytest.raises(Halted):
        waiting.wait()
    aborter.join()


@linux
def test_closing_frees_sockets_and_threads_and_may_be_done_twice():
    with Crew(2, count_what_is_open) as crew:
        for (sockets, threads), (sockets_left, threads_left) in let_go(crew):
            assert sockets > 0 and sockets_left == 0
            assert threads_left < threads


def test_a_member_that_does_not_come_is_a_fault():
    meeting = Meeting(4, lambda key, value: None, timeout_s=0.05)
    with pytest.raises(Fault, match="did not come to generation 4") as caught:
        Group.form(Seat(4, 0, 2, timeout_s=LONG_S), meeting)
    assert not isinstance(caught.value, Halted)
    assert pickle.loads(pickle.dumps(caught.value)).generation == 4


def test_a_meeting_that_is_cancelled_ends_the_forming():
    published = threading.Event()
    meeting = Meeting(4, lambda key, value: published.set(), timeout_s=LONG_S)

    def cancel():
        published.wait()
        meeting.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(Halted, match="before its members had met"):
        Group.form(Seat(4, 0, 2, timeout_s=LONG_S), meeting)
    canceller.join()


def test_one_member_needs_no_one():
    group = Group.form(Seat(1, 0, 1), Meeting(1, lambda key, value: None, timeout_s=0.0))
    tensor = torch.tensor([2.0])
    group.all_reduce(tensor).wait()
    assert tensor.item() == 2.0 and group.all_gather(b"mine") == [b"mine"] and group.raw_bytes == 4
    group.abort()
    with pytest.raises(Halted):
        group.all_reduce(tensor)


@linux
def test_a_descriptor_that_was_opened_anew_is_not_shut_down():
    with socket.create_server(("127.0.0.1", 0)) as server:
        old = socket.create_connection(server.getsockname())
        ours = [entry for entry in tcp_sockets() if entry.fd == old.fileno()]
        old.close()
        with socket.create_connection(server.getsockname()) as new:
            assert new.fileno() == ours[0].fd
            shut_down(ours)
            accepted = [server.accept()[0] for _ in range(2)]
            new.sendall(b"alive")
            assert accepted[1].recv(5) == b"alive"
            for connection in accepted:
                connection.close()
