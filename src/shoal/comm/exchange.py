"""Compressed collectives: a vector becomes its sum over all members, with the same bits on each.

A linear codec's payloads ride an all-reduce. Any other takes two stages (Tang et al. 2021, "1-bit Adam",
arXiv:2102.02888, section 4.2): the vector is cut into a range for each member; an all-to-all brings every member the
others' encodings of its range; it decodes and sums them, encodes the sum, and an all-gather gives that to all.
Deviations: a member's own part of its range is never encoded; and what the second encoding loses is kept in the owner's
own residual, at that range. So there is one residual a member, as long as the vector, whatever the number of members:
when that changes nothing need be cut anew.

An exchange goes through ``start``, ``turn`` and ``end``. Several may be under way if every member makes the same calls
in the same order: what one computes then hides what another sends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from shoal.codecs import Codec, LinearCodec, Summed
from shoal.codecs.rows import Cut, rows_for
from shoal.comm.collectives import Group, Work
from shoal.lanes.hashing import key_of

Shapes = tuple[tuple[int, ...], ...]

_ALIGNED = 1024
"""Pieces are multiples of so many entries, which every codec's blocks divide."""
_ROW_BYTES = 1 << 15
"""What travels together from one member to another, about: on a link that several connections share, rows of several
times that leave it idle at their ends, and smaller ones cost processor."""


@dataclass
class Times:
    """Seconds spent on exchanges since the last ``take``; ``wait_s`` is spent blocked on collectives."""

    encode_s: float = 0.0
    wait_s: float = 0.0
    decode_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.encode_s + self.wait_s + self.decode_s

    def take(self) -> Times:
        """What has come together, to begin again at nothing."""
        taken = Times(self.encode_s, self.wait_s, self.decode_s)
        self.encode_s = self.wait_s = self.decode_s = 0.0
        return taken

    @contextmanager
    def spent(self, on: str) -> Iterator[None]:
        """Add the time within to ``on``: encode, wait or decode."""
        begun_s = time.perf_counter()
        try:
            yield
        finally:
            name = f"{on}_s"
            setattr(self, name, getattr(self, name) + time.perf_counter() - begun_s)

    def await_(self, work: Work) -> None:
        """Wait for a collective."""
        with self.spent("wait"):
            work.wait()


@dataclass
class Memory:
    """What a member remembers from one exchange of a vector to the next: ``residual`` (n,) float32, which it has not
    sent yet, if its codec wants that; and a linear codec's state, the same on every member."""

    residual: Tensor | None = None
    state: tuple[Tensor, ...] = ()


class Exchange(Protocol):
    """One vector after another, of one size, among one group. ``after`` is the memory if the result is taken, once it
    is known."""

    after: Memory | None

    def start(self, flat: Tensor, memory: Memory, key: int, room: Tensor | None) -> None:
        """Begin to sum ``flat`` (n,), to which the residual is added. ``key`` is the same on every member. ``room``
        (n,) is for the next residual, if the codec wants one."""
        ...

    def turn(self) -> None:
        """Wait for the first stage, begin the second. ``after`` is then known, but for codecs of several rounds."""
        ...

    def end(self) -> None:
        """Wait for the second stage. ``flat`` then holds the sum, and ``after`` is known."""
        ...


def exchange_for(group: Group, codec: Codec | None, num_entries: int, shapes: Shapes, times: Times) -> Exchange:
    """How vectors of so many entries are summed among the group."""
    if codec is None:
        return Plain(group, times)
    if isinstance(codec, LinearCodec):
        return Riding(group, codec, shapes, times)
    return Split(group, codec, num_entries, times)


@dataclass
class Plain:
    """An all-reduce of the vector itself. What is left of a codec's residual goes with it: all is sent."""

    group: Group
    times: Times
    after: Memory | None = None

    def start(self, flat: Tensor, memory: Memory, key: int, room: Tensor | None) -> None:
        if memory.residual is not None:
            flat.add_(memory.residual)
        self.after = Memory(None, memory.state)
        self._work = self.group.all_reduce(flat)

    def turn(self) -> None:
        return

    def end(self) -> None:
        self.times.await_(self._work)


class Riding:
    """All-reduces of a linear codec's payloads."""

    def __init__(self, group: Group, codec: LinearCodec, shapes: Shapes, times: Times) -> None:
        self.after: Memory | None = None
        self._group, self._codec, self._shapes, self._times = group, codec, shapes, times

    def start(self, flat: Tensor, memory: Memory, key: int, room: Tensor | None) -> None:
        self._flat, self._room, self.after = flat, room, None
        self._summed: Summed | None = None
        with self._times.spent("encode"):
            self._whole = _with_residual(flat, memory)
            state = memory.state or self._codec.init(self._shapes)
            self._rounds: Generator[Tensor, Tensor, Summed] = self._codec.rounds(self._whole, self._shapes, state, key)
            self._payload = next(self._rounds)
        self._work = self._group.all_reduce(self._payload)

    def turn(self) -> None:
        """Wait for a sum; begin the next, if there is one."""
        self._times.await_(self._work)
        try:
            with self._times.spent("decode"):
                self._payload = self._rounds.send(self._payload)
        except StopIteration as stop:
            self._finish(stop.value)
        else:
            self._work = self._group.all_reduce(self._payload)

    def _finish(self, summed: Summed) -> None:
        self._summed = summed
        if self._room is not None:
            torch.sub(self._whole, summed.own, out=self._room)
        self.after = Memory(self._room, summed.state)

    def end(self) -> None:
        while self._summed is None:
            self.turn()
        with self._times.spent("decode"):
            self._flat.copy_(self._summed.total)


class Split:
    """All-to-all, sum, all-gather. Wire: (world_size - 1) / world_size of the vector's payload, twice.

    In pieces: while one is on the wire another is encoded or decoded.
    """

    def __init__(self, group: Group, codec: Codec, num_entries: int, times: Times) -> None:
        self.after: Memory | None = None
        self._times = times
        num_pieces = -(-codec.payload_bytes(num_entries) // (_ROW_BYTES * group.seat.world_size))
        size = -(-num_entries // (num_pieces * _ALIGNED)) * _ALIGNED
        bounds = [*range(0, num_entries, size), num_entries]
        self._pieces = [
            _Piece(group, codec.share(high - low, num_entries), slice(low, high), times)
            for low, high in pairwise(bounds)
        ]

    def start(self, flat: Tensor, memory: Memory, key: int, room: Tensor | None) -> None:
        self._flat, self._room, self.after = flat, room, None
        self._whole = flat if flat.dtype == torch.float32 else flat.float()
        for number, piece in enumerate(self._pieces):
            piece.start(self._whole, memory.residual, room, key_of(key, number))
            os.sched_yield()  # where cores are shared, every worker's first piece leaves before anyone's last

    def turn(self) -> None:
        for piece in self._pieces:
            piece.turn()
        self.after = Memory(self._room)

    def end(self) -> None:
        for piece in self._pieces:
            piece.end()
        if self._whole is not self._flat:
            self._flat.copy_(self._whole)


class _Piece:
    """A stretch of the vector, cut into a row for each member."""

    def __init__(self, group: Group, codec: Codec, part: slice, times: Times) -> None:
        self._group, self._times, self._part = group, times, part
        size, device = group.seat.world_size, group.seat.device
        self._rows = rows_for(codec, Cut(part.stop - part.start, size), device)
        shape = (size, self._rows.payload_bytes)
        self._sent, self._received, self._gathered = (
            torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(3)
        )
        self._row = torch.zeros(shape[1], dtype=torch.uint8, device=device)

    def start(self, whole: Tensor, residual: Tensor | None, room: Tensor | None, key: int) -> None:
        self._whole, self._key = whole[self._part], key
        self._room = None if room is None else room[self._part]
        with self._times.spent("encode"):
            before = None if residual is None else residual[self._part]
            self._rows.encode(self._whole, self._sent, self._group.seat.rank, key, before, self._room)
        self._work = self._group.all_to_all(self._received, self._sent)

    def turn(self) -> None:
        self._times.await_(self._work)
        with self._times.spent("encode"):  # and some decoding, in one call
            self._rows.sum(self._whole, self._received, self._group.seat.rank, self._key, self._row, self._room)
        self._work = self._group.all_gather_rows(self._gathered, self._row)

    def end(self) -> None:
        self._times.await_(self._work)
        with self._times.spent("decode"):
            self._rows.decode(self._gathered, self._key, self._whole)


def _with_residual(flat: Tensor, memory: Memory) -> Tensor:
    """What is to be sent, in float32: in place if ``flat`` is."""
    whole = flat if flat.dtype == torch.float32 else flat.float()
    return whole if memory.residual is None else whole.add_(memory.residual)
