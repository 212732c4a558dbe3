"""Sums of floats that do not depend on their order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError

_UNIT_BITS = 1074
"""Every finite float64 is a whole multiple of 2**-1074."""
_MANTISSA_BITS = 53
_STATE = re.compile(r"(-?)([0-9a-f]+)p([0-9]+)")


@dataclass(frozen=True)
class ExactSum:
    """The exact sum of finite float64 numbers: a whole number of units of 2**-1074, the smallest float64.

    Nothing is rounded before ``over`` is asked for. An addition costs about 0.1 us.
    """

    units: int

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Self:
        """The sum of all elements, any shape, fewer than 2**31. ``ConfigError`` if one is not finite."""
        if not np.isfinite(values).all():
            raise ConfigError("numbers to be summed exactly must be finite, and some are not or overflow float64")
        mantissas, exponents = np.frexp(values.ravel())
        order = np.argsort(exponents, kind="stable")
        whole = np.ldexp(mantissas[order], _MANTISSA_BITS).astype(np.int64)
        distinct, starts = np.unique(exponents[order], return_index=True)
        if not distinct.size:
            return cls(0)
        # Halves of 21 and 32 bits, so that 2**31 of each add up within an int64.
        highs = np.add.reduceat(whole >> 32, starts).tolist()
        lows = np.add.reduceat(whole & 0xFFFFFFFF, starts).tolist()
        shifts = (distinct + (_UNIT_BITS - _MANTISSA_BITS)).tolist()
        return cls(sum(_shift((high << 32) + low, bits) for high, low, bits in zip(highs, lows, shifts, strict=True)))

    def __add__(self, other: ExactSum) -> Self:
        return type(self)(self.units + other.units)

    def over(self, count: int) -> float:
        """The sum divided by ``count``, rounded once. ``OverflowError`` if that is beyond float64."""
        return self.units / (count << _UNIT_BITS)

    def to_state(self) -> str:
        """Hexadecimal, ``p``, and how many zero bits follow: equal sums give equal states."""
        zeros = (self.units & -self.units).bit_length() - 1 if self.units else 0
        return f"{self.units >> zeros:x}p{zeros}"

    @classmethod
    def from_state(cls, state: str) -> Self:
        found = _STATE.fullmatch(state)
        if not found or int(found[3]) > 2 * _UNIT_BITS:
            raise ValueError(f"an exact sum looks like '1f3p1040', not {state!r}")
        return cls(int(found[1] + found[2], 16) << int(found[3]))


def _shift(whole: int, bits: int) -> int:
    # Subnormal numbers have fewer bits; frexp's are then even, and shifting right loses none.
    return whole << bits if bits >= 0 else whole >> -bits
