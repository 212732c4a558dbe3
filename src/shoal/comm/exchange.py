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

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from shoal.codecs import Codec, LinearCodec, Summed
from shoal.comm.collectives import Group, Work
from shoal.lanes.hashing import key_of

Shapes = tuple[tuple[int, ...], ...]

_FIRST, _SECOND = 1, 2
_ALIGNED = 1024
"""Ranges are multiples of so many entries, which every codec's blocks divide."""


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
    """All-to-all, sum, all-gather. Wire: (world_size - 1) / world_size of the vector's payload, twice."""

    def __init__(self, group: Group, codec: Codec, num_entries: int, times: Times) -> None:
        self.after: Memory | None = None
        self._group, self._codec, self._times = group, codec, times
        size = group.seat.world_size
        row = -(-num_entries // (size * _ALIGNED)) * _ALIGNED
        bounds = [min(rank * row, num_entries) for rank in range(size + 1)]
        self._ranges = [slice(low, high) for low, high in pairwise(bounds)]
        self._codecs = [codec.share(part.stop - part.start, num_entries) for part in self._ranges]
        row_bytes = max(c.payload_bytes(p.stop - p.start) for c, p in zip(self._codecs, self._ranges, strict=True))
        device = group.seat.device
        self._sent, self._received, self._gathered = (
            torch.zeros(size, row_bytes, dtype=torch.uint8, device=device) for _ in range(3)
        )
        self._row = torch.zeros(row_bytes, dtype=torch.uint8, device=device)

    def start(self, flat: Tensor, memory: Memory, key: int, room: Tensor | None) -> None:
        self._flat, self._key, self._room, self.after = flat, key, room, None
        with self._times.spent("encode"):
            self._whole = _with_residual(flat, memory)
            for rank, part in enumerate(self._ranges):
                if rank != self._group.seat.rank and part.stop > part.start:
                    self._encode(self._whole[part], rank, self._sent[rank], self._key_of(_FIRST, self._group.seat.rank))
        self._work = self._group.all_to_all(self._received, self._sent)

    def _encode(self, vector: Tensor, rank: int, out: Tensor, key: int) -> None:
        """Encode a range of ``rank``'s; what that loses is the residual there."""
        codec, part = self._codecs[rank], self._ranges[rank]
        payload = self._payload(out, rank)
        codec.encode(vector, key, payload)
        if self._room is not None:
            residual = self._room[part]
            codec.decode(payload, key, residual)
            torch.sub(vector, residual, out=residual)

    def _payload(self, row: Tensor, rank: int) -> Tensor:
        part = self._ranges[rank]
        return row[: self._codecs[rank].payload_bytes(part.stop - part.start)]

    def _key_of(self, stage: int, rank: int) -> int:
        return key_of(self._key, stage, rank)

    def turn(self) -> None:
        self._times.await_(self._work)
        rank = self._group.seat.rank
        own = self._ranges[rank]
        if own.stop > own.start:
            total = self._whole[own]
            with self._times.spent("decode"):
                for other in range(len(self._ranges)):
                    if other != rank:
                        payload = self._payload(self._received[other], rank)
                        self._codecs[rank].decode(payload, self._key_of(_FIRST, other), total, add=True)
            with self._times.spent("encode"):
                self._encode(total, rank, self._row, self._key_of(_SECOND, rank))
        self.after = Memory(self._room)
        self._work = self._group.all_gather_rows(self._gathered, self._row)

    def end(self) -> None:
        self._times.await_(self._work)
        with self._times.spent("decode"):
            for rank, part in enumerate(self._ranges):
                if part.stop > part.start:
                    payload = self._payload(self._gathered[rank], rank)
                    self._codecs[rank].decode(payload, self._key_of(_SECOND, rank), self._whole[part])
            if self._whole is not self._flat:
                self._flat.copy_(self._whole)


def _with_residual(flat: Tensor, memory: Memory) -> Tensor:
    """What is to be sent, in float32: in place if ``flat`` is."""
    whole = flat if flat.dtype == torch.float32 else flat.float()
    return whole if memory.residual is None else whole.add_(memory.residual)
