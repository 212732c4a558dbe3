"""Arrays inside metrics: counts that add up, and how arrays become plain values."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError

Counts = NDArray[np.int64]
_DTYPES = ("|u1", "<u2", "<u4", "<i8", "<f4", "<f8")


@dataclass(frozen=True, eq=False)
class Tally:
    """Non-negative counts of a fixed shape, such as (classes,) or (classes, classes). Not to be written to."""

    counts: Counts

    def __add__(self, other: Tally) -> Self:
        if self.counts.shape != other.counts.shape:
            raise ConfigError(
                f"counts over as many classes were needed; {self.counts.shape} and {other.counts.shape} came"
            )
        return type(self)(self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tally) and np.array_equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash(self.counts.tobytes())

    def to_state(self) -> dict[str, Any]:
        return {"shape": list(self.counts.shape), **pack_counts(self.counts)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(unpack(state).astype(np.int64).reshape([int(n) for n in state["shape"]]))


def pack_counts(counts: Counts) -> dict[str, str]:
    """Non-negative counts in the fewest bytes that hold the largest."""
    largest = int(counts.max(initial=0))
    fitting = next((d for d in _DTYPES[:3] if largest <= np.iinfo(d).max), "<i8")
    return pack(counts.astype(fitting))


def pack_floats(values: NDArray[np.float64]) -> dict[str, str]:
    """Finite floats, in 4 bytes each if all of them are exact float32 numbers, else in 8."""
    with np.errstate(over="ignore"):
        short = values.astype("<f4")
    return pack(short if np.array_equal(short, values) else values.astype("<f8"))


def pack(array: NDArray[Any]) -> dict[str, str]:
    """A little-endian array's type and bytes, in base64."""
    return {"dtype": array.dtype.str, "data": base64.b64encode(array.tobytes()).decode("ascii")}


def unpack(state: Mapping[str, Any]) -> NDArray[Any]:
    """The flat array that was packed. ``ValueError`` if these are not its bytes."""
    if state["dtype"] not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {state['dtype']!r}")
    return np.frombuffer(base64.b64decode(state["data"], validate=True), dtype=state["dtype"])
