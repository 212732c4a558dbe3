"""What training needs of data: how it falls into blocks, and rows of them as tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from shoal.lanes import Part

Batch = tuple[Tensor, ...] | dict[str, Tensor]
"""Tensors whose first axis counts samples."""


@runtime_checkable
class Source(Protocol):
    """A data set. It holds no thread and no open file, so it can be handed to other processes, and forked with."""

    def block_sizes(self) -> tuple[int, ...]:
        """Rows in each block: what is cheap to read together."""
        ...

    def open(self) -> Reader:
        """A reader for one process."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON, for the run's record."""
        ...


@runtime_checkable
class Reader(Protocol):
    """Reads for one process. All but ``close`` may be called from several threads."""

    def gather(self, parts: Sequence[Part]) -> Batch:
        """The rows of all parts (at least one) as one batch, in order. The tensors are the caller's."""
        ...

    def expect(self, blocks: Collection[int]) -> None:
        """These will be gathered from soon, the first soonest: begin to read them, and keep them until ``release``."""
        ...

    def release(self, blocks: Collection[int]) -> None:
        """These are not needed for now."""
        ...

    def close(self) -> None:
        """Let go of files and threads."""
        ...
