"""Rows out of several tables into one batch, with one copy and no temporary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.lanes.hashing import Indices
from shoal.sources.source import Batch

Array = npt.NDArray[Any]

_OF_WIDTH = {1: torch.int8, 2: torch.int16}
"""For what NumPy lacks, such as bfloat16: only moved, never computed with."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A table of equally long arrays, as NumPy sees them; ``names`` is None where a batch is a tuple."""

    names: tuple[str, ...] | None
    arrays: tuple[Array, ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(batch: Batch) -> Columns:
        tensors = tuple(batch.values() if isinstance(batch, dict) else batch)
        names = tuple(batch) if isinstance(batch, dict) else None
        return Columns(names, tuple(as_numpy(tensor) for tensor in tensors), tuple(t.dtype for t in tensors))

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def kind(self) -> str:
        """What must be the same of all tables that rows of one batch come from."""
        return ", ".join(
            f"{name}: {str(dtype).removeprefix('torch.')} {('rows', *array.shape[1:])}".replace("'", "")
            for name, dtype, array in zip(self.names or range(len(self.arrays)), self.dtypes, self.arrays, strict=True)
        )


def as_numpy(tensor: Tensor) -> Array:
    """The same memory as an array, of integers of the same width if NumPy lacks the type."""
    tensor = tensor.detach().cpu()
    try:
        array: Array = tensor.numpy()
    except TypeError:
        array = tensor.view(_OF_WIDTH[tensor.itemsize]).numpy()
    return array


def take(tables: Sequence[Columns], rows: Sequence[Indices]) -> Batch:
    """``rows[i]`` of ``tables[i]``, one after another. The tables are of one kind, and have these rows."""
    first = tables[0]
    num_rows = sum(len(some) for some in rows)
    taken = []
    for index, (array, dtype) in enumerate(zip(first.arrays, first.dtypes, strict=True)):
        tensor = torch.empty((num_rows, *array.shape[1:]), dtype=dtype)
        _fill(as_numpy(tensor), [table.arrays[index] for table in tables], rows)
        taken.append(tensor)
    return tuple(taken) if first.names is None else dict(zip(first.names, taken, strict=True))


def _fill(out: Array, arrays: Sequence[Array], rows: Sequence[Indices]) -> None:
    start = 0
    for array, some in zip(arrays, rows, strict=True):
        stop = start + len(some)
        if array.flags.c_contiguous:
            array.take(some, 0, out[start:stop], "clip")  # any other mode goes through a temporary
        else:
            out[start:stop] = array[some]  # take would copy the whole array first
        start = stop


def dtype_of(dtype: np.dtype[Any]) -> torch.dtype | None:
    """Torch's type of the same values; None if it has none."""
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except (TypeError, ValueError):
        return None
