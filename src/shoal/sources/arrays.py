"""Arrays in memory or memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.lanes import Part
from shoal.sources.source import Batch

Array = npt.NDArray[Any]


class Arrays:
    """NumPy arrays or tensors of one length; batches are tuples in their order, or dicts for those given by name.

    A path of a ``.npy`` file is memory-mapped, and so is an array that was: only the rows that are used are read.
    ``block_rows`` rows are shuffled together; for arrays on disk, more means longer runs of neighbouring reads.
    """

    def __init__(self, *arrays: Any, block_rows: int = 256, **named: Any) -> None:
        if bool(arrays) == bool(named):
            raise ConfigError(
                "Arrays takes arrays, or arrays by name, and not both; for example Arrays(images, labels)"
            )
        if block_rows < 1:
            raise ConfigError(f"block_rows must be at least 1, not {block_rows}")
        given = named or {str(index): array for index, array in enumerate(arrays)}
        self._arrays = {name: _as_array(name, value) for name, value in given.items()}
        self._named = bool(named)
        self._block_rows = block_rows
        sizes = {name: len(array) for name, array in self._arrays.items()}
        if len(set(sizes.values())) > 1:
            raise ConfigError(
                f"arrays must have one length; they have {', '.join(f'{n}: {s}' for n, s in sizes.items())}"
            )
        self._num_samples = next(iter(sizes.values()))

    def block_sizes(self) -> tuple[int, ...]:
        whole, rest = divmod(self._num_samples, self._block_rows)
        return (self._block_rows,) * whole + ((rest,) if rest else ())

    def open(self) -> ArraysReader:
        return ArraysReader(self._arrays, self._named, self._block_rows)

    def describe(self) -> dict[str, Any]:
        arrays = {name: [str(array.dtype), *array.shape] for name, array in self._arrays.items()}
        return {"kind": "Arrays", "arrays": arrays, "block_rows": self._block_rows}


def _as_array(name: str, value: Any) -> Array:
    if isinstance(value, str | Path):
        try:
            value = np.load(value, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"array {name} cannot be read from {value}: {error}") from error
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        value = np.asarray(value)
    if value.ndim == 0 or value.dtype.hasobject:
        raise ConfigError(f"array {name} must have rows of numbers; it is {value.dtype} of shape {value.shape}")
    return value


class ArraysReader:
    """One fancy index an array and batch."""

    def __init__(self, arrays: dict[str, Array], named: bool, block_rows: int) -> None:
        self._arrays = arrays
        self._named = named
        self._block_rows = block_rows

    def gather(self, parts: Sequence[Part]) -> Batch:
        rows = np.concatenate([part.rows + part.block * self._block_rows for part in parts])
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array[rows])) for name, array in self._arrays.items()}
        return tensors if self._named else tuple(tensors.values())

    def expect(self, parts: Sequence[Part]) -> None:
        return

    def close(self) -> None:
        return
