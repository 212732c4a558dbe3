"""Arrays in memory or memory-mapped."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.lanes import Part
from shoal.sources.columns import Array, Columns, as_numpy, dtype_of, take
from shoal.sources.source import Batch


class Arrays:
    """NumPy arrays or tensors of one length; batches are tuples in their order, or dicts for those given by name.

    A path of a ``.npy`` file is memory-mapped, and so is an array that was: only the rows that are used are read.
    ``block_rows`` rows are shuffled together; for arrays on disk, more means longer runs of neighbouring reads.
    ``ConfigError`` for arrays of unequal length, or of what no tensor can hold.
    """

    def __init__(self, *arrays: Any, block_rows: int = 256, **named: Any) -> None:
        if bool(arrays) == bool(named):
            raise ConfigError(
                "Arrays takes arrays, or arrays by name, and not both; for example Arrays(images, labels)"
            )
        if block_rows < 1:
            raise ConfigError(f"block_rows must be at least 1, not {block_rows}")
        given = named or {str(index): array for index, array in enumerate(arrays)}
        found = [_read(name, value) for name, value in given.items()]
        sizes = {name: len(array) for name, (array, _) in zip(given, found, strict=True)}
        if len(set(sizes.values())) > 1:
            raise ConfigError(
                f"arrays must have one length; they have {', '.join(f'{n}: {s}' for n, s in sizes.items())}"
            )
        self._columns = Columns(
            tuple(named) if named else None, tuple(array for array, _ in found), tuple(dtype for _, dtype in found)
        )
        self._block_rows = block_rows
        self._num_samples = next(iter(sizes.values()))

    def block_sizes(self) -> tuple[int, ...]:
        whole, rest = divmod(self._num_samples, self._block_rows)
        return (self._block_rows,) * whole + ((rest,) if rest else ())

    def open(self) -> ArraysReader:
        return ArraysReader(self._columns, self._block_rows)

    def describe(self) -> dict[str, Any]:
        columns = self._columns
        names = columns.names or tuple(str(index) for index in range(len(columns.arrays)))
        kinds = [
            [str(dtype).removeprefix("torch."), *array.shape]
            for array, dtype in zip(columns.arrays, columns.dtypes, strict=True)
        ]
        return {"kind": "Arrays", "arrays": dict(zip(names, kinds, strict=True)), "block_rows": self._block_rows}


def _read(name: str, value: Any) -> tuple[Array, torch.dtype]:
    if isinstance(value, Tensor):
        array, dtype = as_numpy(value), value.dtype
    else:
        array = _load(name, value) if isinstance(value, str | Path) else np.asanyarray(value)
        known = dtype_of(array.dtype)
        if known is None:
            raise ConfigError(f"array {name} must be of numbers that a tensor can hold, and it is of {array.dtype}")
        dtype = known
    if array.ndim == 0:
        raise ConfigError(f"array {name} must have rows, and it is a single number")
    return array, dtype


def _load(name: str, path: str | Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"array {name} cannot be read from {path}: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ConfigError(f"array {name} must be one array: {path} holds several; load it and choose")
    return array


class ArraysReader:
    """One copy of the rows an array and batch; nothing is read ahead."""

    def __init__(self, columns: Columns, block_rows: int) -> None:
        self._columns = columns
        self._block_rows = block_rows

    def gather(self, parts: Sequence[Part]) -> Batch:
        firsts = np.repeat([part.block * self._block_rows for part in parts], [len(part.rows) for part in parts])
        return take([self._columns], [np.concatenate([part.rows for part in parts]) + firsts])

    def expect(self, blocks: Collection[int]) -> None:
        return

    def release(self, blocks: Collection[int]) -> None:
        return

    def close(self) -> None:
        return
