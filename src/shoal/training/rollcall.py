"""The roll call: one small all-reduce a step, in which the members check each other while backward runs.

It sums what each contributed, and it finds out whether all say the same: numbers v are equal on all n members exactly
if n * sum(v^2) = sum(v)^2 (Cauchy-Schwarz). Every number is an integer that float64 adds without error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.lanes import Ledger

_PIECES = 4
_PIECE_BITS = 16
_MASK = (1 << _PIECE_BITS) - 1


@dataclass(frozen=True)
class Call:
    """What one member says. ``order``: the number of the order that it holds, 0 for none. ``fingerprint``: 16 hex
    digits of what it holds, or nothing when none is due or it is still catching up. ``due``: it wants a version to be
    stored that all must make together."""

    ledger: Ledger
    loss_sum: float
    bad: bool
    order: int
    fingerprint: str = ""
    due: bool = False


@dataclass(frozen=True)
class Roll:
    """What all ``num_present`` members say. ``order``: the one that all of them hold, else 0; ``some_ordered``: one has
    reached some of them."""

    ledger: Ledger
    loss_sum: float
    num_bad: int
    order: int
    fingerprints_differ: bool
    due: bool
    num_present: int
    some_ordered: bool = False


NUM_ENTRIES = 20


def encode(call: Call) -> Tensor:
    """(20,) float64: sums, then order and fingerprint pieces with their squares."""
    voter = int(bool(call.fingerprint))
    pieces = _split(int(call.fingerprint, 16)) if voter else [0] * _PIECES
    agreements = [call.order, *pieces]
    entries = [
        call.ledger.count, *_split(call.ledger.checksum), call.loss_sum, int(call.bad), 1, voter,
        int(call.due),
        *agreements, *(value * value for value in agreements),
    ]  # fmt: skip
    return torch.tensor(entries, dtype=torch.float64)


def decode(summed: Tensor) -> Roll:
    """Read the sum of all members' calls."""
    count, *rest = summed.tolist()
    checksum, (loss_sum, num_bad, present, voters, num_due), votes = rest[:_PIECES], rest[_PIECES:9], rest[9:]
    sums, squares = votes[: _PIECES + 1], votes[_PIECES + 1 :]
    agree = [n * square == total * total for n, total, square in
             zip([present, *[voters] * _PIECES], sums, squares, strict=True)]  # fmt: skip
    return Roll(
        ledger=Ledger(int(count), _join([int(piece) for piece in checksum])),
        loss_sum=loss_sum,
        num_bad=int(num_bad),
        order=int(sums[0] / present) if agree[0] else 0,
        fingerprints_differ=not all(agree[1:]),
        due=num_due > 0,
        num_present=int(present),
        some_ordered=sums[0] > 0,
    )


def _split(value: int) -> list[int]:
    return [(value >> (_PIECE_BITS * i)) & _MASK for i in range(_PIECES)]


def _join(pieces: list[int]) -> int:
    return sum(piece << (_PIECE_BITS * i) for i, piece in enumerate(pieces)) % (1 << 64)
