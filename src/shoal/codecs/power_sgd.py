"""Low-rank matrices."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod

import torch
from torch import Tensor

from shoal.codecs.codec import (
    Shapes,
    State,
    Summed,
    check_decoded,
    check_payload,
    check_vector,
    floats,
    padded,
    payload_for,
)
from shoal.codecs.noise import subkey, uniform, words
from shoal.codecs.orthogonal import orthogonal, outer_sum, unit_or_new
from shoal.errors import ConfigError


@dataclass(frozen=True)
class PowerSGD:
    """Send each matrix's projection onto ``rank`` columns, found by one step of power iteration; keep the rest.

    Wire:   4 rank (rows + columns) bytes a matrix, in two rounds, against 4 rows columns.
    Vogels et al. 2019 (arXiv:1905.13727, Algorithms 1 and 2). A parameter of more than two dimensions counts as a
    matrix with its first dimension as rows; one of fewer, or one that would not get smaller, goes uncompressed with the
    first round. The state is each matrix's Q (columns, rank) float32, with which the next step begins (warm start).

    Deviations: the first Q is uniform from a fixed key, not normal; the columns of a Q are brought to length 1 before
    they are used again, and one that is zero or not finite is replaced by a new one from the step's key. P is
    orthogonalised by Gram-Schmidt in float64, every column twice, in an order of sums that is the same on every
    machine; so is the product of P and Q. Only what is summed over the members depends on the machine.

    Without a group, ``encode`` and ``decode`` take the vector for one matrix, as square as can be. They send what a
    group of one would, but begin with a new Q from the key, as there is no state.
    """

    rank: int = 2
    feedback: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank must be at least 1: {self}")

    def check(self, dtype: torch.dtype, num_entries: int) -> None:
        check_vector(self, dtype, num_entries)

    def share(self, num_entries: int, total: int) -> PowerSGD:
        return self

    def payload_bytes(self, num_entries: int) -> int:
        return padded(4 * sum(_round_sizes(self._parts(_as_square(num_entries)))))

    def encode(self, vector: Tensor, key: int, out: Tensor | None = None) -> Tensor:
        n = vector.numel()
        payload = payload_for(vector, self.payload_bytes(n), out)
        shapes = _as_square(n)
        at, alone = 0, self.rounds(vector, shapes, self._new_state(shapes, key), key)
        sent = next(alone)
        try:
            while True:
                payload[at : at + 4 * sent.numel()].view(torch.float32).copy_(sent)
                at += 4 * sent.numel()
                sent = alone.send(sent)
        except StopIteration:
            payload[at:].zero_()
        return payload

    def decode(self, payload: Tensor, key: int, out: Tensor, *, add: bool = False) -> None:
        check_decoded(out)
        check_payload(payload, self.payload_bytes(out.numel()))
        parts = self._parts(_as_square(out.numel()))
        first, second = _round_sizes(parts)
        entries = payload[: 4 * (first + second)].view(torch.float32)
        ps, total = _unpack_first(entries[:first], parts, out.numel())
        _expand(parts, ps, _unpack_second(entries[first:], parts), total)
        out.add_(total) if add else out.copy_(total)

    def init(self, shapes: Shapes) -> State:
        return self._new_state(shapes, 0)

    def rounds(self, vector: Tensor, shapes: Shapes, state: State, key: int) -> Generator[Tensor, Tensor, Summed]:
        parts, x = self._parts(shapes), floats(vector)
        matrices = [part.of(x) for part in parts if part.rank]
        qs = [q.to(x.device) for q in state]
        first = [(m @ q).view(-1) for m, q in zip(matrices, qs, strict=True)]
        first += [part.of(x).view(-1) for part in parts if not part.rank]
        ps, total = _unpack_first((yield torch.cat(first)), parts, x.numel())
        own = x.clone()
        if not matrices:
            return Summed(total, own, ())
        own_qs = [m.T @ p for m, p in zip(matrices, ps, strict=True)]
        _expand(parts, ps, own_qs, own)
        qs = _unpack_second((yield torch.cat([q.reshape(-1) for q in own_qs])), parts)
        _expand(parts, ps, qs, total)
        compressed = (part for part in parts if part.rank)
        new = (unit_or_new(q, partial(_new_q, part, key)) for q, part in zip(qs, compressed, strict=True))
        return Summed(total, own, tuple(new))

    def _new_state(self, shapes: Shapes, key: int) -> State:
        return tuple(_new_q(part, key) for part in self._parts(shapes) if part.rank)

    def _parts(self, shapes: Shapes) -> list[_Part]:
        parts, start = [], 0
        for shape in shapes:
            rows = shape[0] if len(shape) > 1 else 1
            columns = prod(shape[1:]) if len(shape) > 1 else prod(shape)
            rank = min(self.rank, rows, columns)
            gains = rank * (rows + columns) < rows * columns
            parts.append(_Part(start, rows, columns, rank if gains else 0))
            start += rows * columns
        return parts


@dataclass(frozen=True)
class _Part:
    """Where a parameter lies in the vector. Rank 0 goes uncompressed."""

    start: int
    rows: int
    columns: int
    rank: int

    def of(self, vector: Tensor) -> Tensor:
        return vector[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


def _as_square(num_entries: int) -> Shapes:
    """A matrix as square as can be, and what is left over."""
    rows = isqrt(num_entries)
    columns = num_entries // rows
    return (rows, columns), (num_entries - rows * columns,)


def _new_q(part: _Part, key: int) -> Tensor:
    entries = uniform(part.columns * part.rank, words(subkey(key, part.start)), torch.device("cpu"))
    return (2 * entries - 1).view(part.columns, part.rank)


def _round_sizes(parts: Sequence[_Part]) -> tuple[int, int]:
    """How many floats the two rounds carry."""
    plain = sum(part.rows * part.columns for part in parts if not part.rank)
    return plain + sum(p.rows * p.rank for p in parts), sum(p.columns * p.rank for p in parts)


def _unpack_first(summed: Tensor, parts: Sequence[_Part], num_entries: int) -> tuple[list[Tensor], Tensor]:
    """The orthogonalised P of each matrix, and a new vector that holds what went uncompressed."""
    total, at, ps = summed.new_empty(num_entries), 0, []
    for part in (part for part in parts if part.rank):
        size = part.rows * part.rank
        ps.append(orthogonal(summed[at : at + size].view(part.rows, part.rank)))
        at += size
    for part in (part for part in parts if not part.rank):
        size = part.rows * part.columns
        part.of(total).view(-1).copy_(summed[at : at + size])
        at += size
    return ps, total


def _unpack_second(summed: Tensor, parts: Sequence[_Part]) -> list[Tensor]:
    compressed = [part for part in parts if part.rank]
    pieces = torch.split(summed, [part.columns * part.rank for part in compressed])
    return [piece.view(part.columns, part.rank) for piece, part in zip(pieces, compressed, strict=True)]


def _expand(parts: Sequence[_Part], ps: Sequence[Tensor], qs: Sequence[Tensor], out: Tensor) -> None:
    """Write P Q^T of each matrix to its place."""
    for part, p, q in zip([part for part in parts if part.rank], ps, qs, strict=True):
        outer_sum(p, q, part.of(out))
