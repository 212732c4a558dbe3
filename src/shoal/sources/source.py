"""What training needs of data: how it falls into blocks, and rows of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from shoal.lanes import Part

Batch = tuple[Tensor, ...] | dict[str, Tensor]
"""Tensors whose first axis counts samples."""


@runtime_checkable
class Source(Protocol):
    """A data set. It holds no open file, so it can be handed to other processes."""

    def block_sizes(self) -> tuple[int, ...]:
        """Rows in each block: what is cheap to read together."""
        ...

    def open(self) -> Reader:
        """A reader for one process."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON, for the run's record."""
        ...


class Reader(Protocol):
    """Reads for one process. ``gather`` may be called from several threads."""

    def gather(self, parts: Sequence[Part]) -> Batch:
        """The rows of all parts as one batch, in order."""
        ...

    def expect(self, parts: Sequence[Part]) -> None:
        """These will be gathered soon: a reader may begin to read them in the background."""
        ...

    def close(self) -> None:
        """Let go of files and threads."""
        ...


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one kind as one, along the first axis."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, dict):
        return {name: torch.cat([batch[name] for batch in batches]) for name in first}  # type: ignore[call-overload]
    return tuple(torch.cat(list(column)) for column in zip(*batches, strict=True))  # type: ignore[arg-type]


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, copied."""
    if isinstance(batch, dict):
        return {name: tensor.index_select(0, rows) for name, tensor in batch.items()}
    return tuple(tensor.index_select(0, rows) for tensor in batch)
