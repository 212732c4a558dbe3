"""Collectives among the members of one generation, on torch's process groups, with an abort that works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shoal.comm.meeting import Meeting
from shoal.comm.sockets import Address, Traffic, belongs, can_find_sockets, shut_down, tcp_sockets, traffic
from shoal.errors import Bug, ConfigError, Fault, Halted

dist: Any = torch.distributed
_c10d: Any = torch._C._distributed_c10d  # the options that torch.distributed does not pass on

_CONNECT_S = 10.0
"""For a connection to a member that has told its address: across a cut link there comes no answer."""


@dataclass(frozen=True)
class Seat:
    """A member's place in a generation. ``host`` is the address that the others reach it at.

    ``timeout_s``: what a collective may take, however long a peer computes before it takes part.
    """

    generation: int
    rank: int
    world_size: int
    host: str = "127.0.0.1"
    device: str = "cpu"
    timeout_s: float = 60.0


_FEW_BYTES = 1 << 11
"""Up to here every member sends its part of a sum to every other: a ring takes two turns for each member, and at each
what is small waits behind whatever is large on a link."""
_GLANCE = timedelta(seconds=0.1)
"""How often a wait looks for an abort. Gloo (torch 2.13) now and then loses the error of a connection that ends just as
a collective begins on it, and would wait for the whole time-out."""


class Work:
    """A collective under way."""

    def __init__(self, group: Group, handle: Any) -> None:
        self._group = group
        self._handle = handle
        self._then: Callable[[], None] | None = None

    def then(self, act: Callable[[], None]) -> Work:
        """Have ``wait`` do this with what has come."""
        self._then = act
        return self

    def wait(self) -> None:
        """Return when the result is in place. ``Halted`` after an abort, ``Fault`` if a peer or link failed."""
        if self._handle is None:
            return
        while not self._waited():
            self._group.check()
        if self._then is not None:
            self._then()
            self._then = None

    def _waited(self) -> bool:
        if self._group.seat.device == "cpu":
            with suppress(RuntimeError):
                self._handle.wait(_GLANCE)
            if not self._handle.is_completed():
                return False
        try:  # it may have ended, well or not, just after the glance
            self._handle.wait()
        except RuntimeError as error:
            raise self._group.translated(error) from error
        return True


class Group:
    """The members of one generation. Made by ``form``; one thread starts collectives, any thread may ``abort``.

    Every member starts the same collectives in the same order. After the first error the group is of no more use.
    """

    def __init__(self, seat: Seat, backend: Any, listeners: frozenset[Address]) -> None:
        self.seat = seat
        self._backend = backend
        self._listeners = listeners
        self._aborted = threading.Event()
        self._raw_bytes = 0
        self._under_way: list[Any] = []
        self._options = dist.AllreduceOptions()
        self._options.timeout = timedelta(seconds=seat.timeout_s)

    @staticmethod
    def form(seat: Seat, meeting: Meeting) -> Group:
        """Meet the other members: 5 to 150 ms for 2 to 32 of them. ``Fault`` if one does not come in time; ``Halted``
        at once if the meeting is cancelled."""
        if seat.world_size == 1:
            return Group(seat, None, frozenset())
        return _Forming(seat, meeting).result()

    @property
    def aborted(self) -> bool:
        return self._aborted.is_set()

    def check(self) -> None:
        """Raise ``Halted`` if the group has been aborted: for long computations between collectives."""
        if self._aborted.is_set():
            raise Halted(f"generation {self.seat.generation} was halted", generation=self.seat.generation)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Start to replace ``tensor`` by its sum over all members: the same bits on each."""
        if self.seat.device == "cpu" and self._backend is not None and 0 < tensor.nbytes <= _FEW_BYTES:
            return self._sum_of_all(tensor)
        return self._start(tensor, lambda backend: backend.allreduce([tensor], self._options))

    def _sum_of_all(self, tensor: Tensor) -> Work:
        """The sum in order of rank, of what all members send to each other."""
        rows = tensor.new_empty(self.seat.world_size, tensor.numel())
        work = self.all_gather_rows(rows.view(torch.uint8), tensor.reshape(-1).view(torch.uint8))

        def add_up() -> None:
            total = rows[0]
            for row in rows[1:]:
                total += row
            tensor.copy_(total.view(tensor.shape))

        return work.then(add_up)

    def all_to_all(self, received: Tensor, rows: Tensor) -> Work:
        """Start to give row r of ``rows`` (world_size, n) to rank r; row r of ``received`` comes from there."""
        return self._to_each(received, rows, rows)

    def _to_each(self, received: Tensor, rows: Tensor, given: Tensor) -> Work:
        """``given``: what the rows were made from."""
        if self._backend is None:
            received.copy_(rows)
        options = dist.AllToAllOptions()
        options.timeout = self._options.timeout
        flat = received.view(-1), rows.view(-1)
        return self._start(given, lambda backend: backend.alltoall_base(*flat, [], [], options))

    def all_gather_rows(self, received: Tensor, row: Tensor) -> Work:
        """Start to give ``row`` (n,) to all members: row r of ``received`` (world_size, n) is rank r's."""
        if self.seat.device == "cpu":  # gloo's own goes round in a ring, and waits at every turn
            return self._to_each(received, row.expand(self.seat.world_size, -1).contiguous(), row)
        options = _c10d.AllgatherOptions()
        options.timeout = self._options.timeout
        return self._start(row, lambda backend: backend._allgather_base(received.view(-1), row, options))

    def _start(self, tensor: Tensor, start: Callable[[Any], Any]) -> Work:
        self.check()
        self._raw_bytes += tensor.nbytes
        if self._backend is None:
            return Work(self, None)
        try:
            handle = start(self._backend)
        except RuntimeError as error:
            raise self.translated(error) from error
        self._under_way = [other for other in self._under_way if not other.is_completed()]
        self._under_way.append(handle)
        return Work(self, handle)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every member's payload, by rank. For small things such as metrics: all of it goes to all members."""
        if self._backend is None:
            self.check()
            return [payload]
        sizes = torch.zeros(self.seat.world_size, dtype=torch.int64, device=self.seat.device)
        sizes[self.seat.rank] = len(payload)
        self.all_reduce(sizes).wait()
        longest = int(sizes.max())
        table = torch.zeros(self.seat.world_size, longest, dtype=torch.uint8, device=self.seat.device)
        if payload:
            table[self.seat.rank, : len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self.all_reduce(table).wait()
        return [row[:size].numpy().tobytes() for row, size in zip(table.cpu(), sizes.tolist(), strict=True)]

    def translated(self, error: Exception) -> Fault:
        """What a failed collective means."""
        seat = self.seat
        if self.aborted:
            return Halted(f"generation {seat.generation} was halted", seat.rank, seat.generation)
        return Fault(f"a collective failed: {_first_line(error)}", seat.rank, seat.generation)

    def abort(self) -> None:
        """Make every collective raise, now and from now on, here and at the peers; from any thread, at any time."""
        self._aborted.set()
        if self._backend is None:
            return
        if self.seat.device == "cpu":
            shut_down(self._sockets())
        else:
            self._backend.abort()

    def traffic(self) -> Traffic | None:
        """What this group's connections have carried as the kernel counted it, or None where it does not tell."""
        if self.seat.device != "cpu" or not can_find_sockets():
            return None
        return traffic(self._sockets())

    @property
    def raw_bytes(self) -> int:
        """Bytes of tensors handed to collectives so far, before any ring or tree multiplies them."""
        return self._raw_bytes

    def close(self) -> None:
        """Abort, and free the group's threads and sockets; if gloo has lost a collective, once that has timed out."""
        self.abort()
        lost = [handle for handle in self._under_way if not handle.is_completed()]
        if lost:
            threading.Thread(target=_outlive, args=(self._backend, lost), name="shoal-lost", daemon=True).start()
        self._backend, self._under_way = None, []

    def _sockets(self) -> list[Any]:
        return [entry for entry in tcp_sockets() if belongs(entry, self._listeners)]


class _Forming:
    """Forms a group in a thread, which is left to itself if the meeting is cancelled: nothing else ends an attempt to
    connect to a member that died after it had told its address."""

    def __init__(self, seat: Seat, meeting: Meeting) -> None:
        self._seat = seat
        self._meeting = meeting
        self._group: Group | None = None
        self._error: BaseException | None = None
        self._left = False
        threading.Thread(target=self._run, name="shoal-form", daemon=True).start()

    def _run(self) -> None:
        form = _form_gloo if self._seat.device == "cpu" else _form_nccl
        try:
            self._group = form(self._seat, self._meeting)
        except BaseException as error:  # noqa: BLE001 - raised where the group is awaited
            self._error = error
        self._meeting.notify()
        if self._left and self._group is not None:
            self._group.close()

    def result(self) -> Group:
        seat = self._seat
        try:
            self._meeting.wait_until(lambda: self._group is not None or self._error is not None)
        except Halted:
            self._left = True
            if self._group is not None:
                self._group.close()
            raise
        if self._group is not None:
            return self._group
        if not isinstance(self._error, RuntimeError):
            raise self._error or Bug("a group was neither formed nor refused")
        message = f"generation {seat.generation} could not meet: {_first_line(self._error)}"
        raise Fault(message, rank=seat.rank, generation=seat.generation) from self._error


def _outlive(backend: Any, handles: list[Any]) -> None:
    """Freed while a collective is under way, a backend waits for it and lets no other thread run meanwhile."""
    for handle in handles:
        with suppress(RuntimeError):
            handle.wait()
    del backend


def _form_gloo(seat: Seat, meeting: Meeting) -> Group:
    before = {entry.fd for entry in tcp_sockets() if entry.listens}
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=seat.host)]
    options._timeout = timedelta(seconds=min(seat.timeout_s, _CONNECT_S))
    ours = [entry for entry in tcp_sockets() if entry.listens and entry.fd not in before]
    meeting.set(f"listener/{seat.rank}", ",".join(f"{host}|{port}" for host, port in (e.local for e in ours)))
    backend = dist.ProcessGroupGloo(meeting, seat.rank, seat.world_size, options)
    return Group(seat, backend, _all_listeners(seat, meeting))


def _all_listeners(seat: Seat, meeting: Meeting) -> frozenset[Address]:
    texts = [meeting.get(f"listener/{rank}").decode() for rank in range(seat.world_size)]
    pairs = [part.rsplit("|", 1) for text in texts for part in text.split(",") if part]
    return frozenset((host, int(port)) for host, port in pairs)


def _form_nccl(seat: Seat, meeting: Meeting) -> Group:
    if not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for and this machine has none; say device='cpu'")
    if seat.rank == 0:
        store = dist.TCPStore(seat.host, 0, None, True, wait_for_workers=False)
        meeting.set("tcp-store", f"{seat.host}|{store.port}")
    host, port = meeting.get("tcp-store").decode().rsplit("|", 1)
    if seat.rank != 0:
        store = dist.TCPStore(host, int(port), None, False)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=seat.timeout_s)
    return Group(seat, dist.ProcessGroupNCCL(store, seat.rank, seat.world_size, options), frozenset())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
