"""Pulls of a step's rows that begin before the step does: hidden behind what is computed meanwhile.

Which ids a module is going to ask for is known from the batch, if those that it asked for last time were a part of that
batch: a column, or some columns side by side. Whether they are what it then does ask for is looked at, so that a guess
that was wrong costs a pull and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor, equal, nn

from shoal.shards.client import Pulling
from shoal.tables.batches import distinct

Ids = npt.NDArray[np.int64]
Places = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]
Batch = Mapping[str, Tensor] | Sequence[Tensor]
"""What a source gives: tensors by name or by position."""


@dataclass(frozen=True)
class _Part:
    """Some columns of a tensor of a batch: the batch's number in its step, the tensor's in the batch, what that tensor
    is like, where in a row they begin (elements), and the shape and strides of what is asked for, but for the number
    of rows."""

    batch: int
    tensor: int
    like: tuple[object, ...]
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, batches: Sequence[Batch]) -> Tensor | None:
        """The same part of other batches."""
        if self.batch >= len(batches):
            return None
        tensors = _tensors(batches[self.batch])
        if self.tensor >= len(tensors) or _like(tensors[self.tensor]) != self.like:
            return None
        whole = tensors[self.tensor]
        return whole.as_strided((len(whole), *self.shape), self.strides, whole.storage_offset() + self.start)


@dataclass(frozen=True)
class _Ahead:
    """Ids that a module will probably ask for, and the pull that has begun for them."""

    ids: Tensor
    unique: Ids
    places: Places
    pulling: Pulling


class Foresight:
    """``look`` at a step's batches before it, ``begin`` it with them; ``find`` is for the modules.

    ``ask`` begins a pull for a step, ``rows`` waits for it, and ``drop`` forgets one. ``num_found``: how many pulls had
    begun before they were asked for.
    """

    def __init__(
        self, ask: Callable[[str, Ids, int], Pulling], rows: Callable[[Pulling], Weights],
        drop: Callable[[Pulling], None],
    ) -> None:  # fmt: skip
        self.num_found = 0
        self._ask, self._rows, self._drop = ask, rows, drop
        self._parts: dict[tuple[nn.Module, int], tuple[str, _Part]] = {}
        self._now: dict[tuple[nn.Module, int], _Ahead] = {}
        self._coming: dict[tuple[nn.Module, int], _Ahead] = {}
        self._coming_step = -1
        self._batches: Sequence[Batch] = ()
        self._num_asked: dict[nn.Module, int] = {}

    def look(self, batches: Sequence[Batch], step: int) -> None:
        """Begin to pull what that step will need."""
        self._forget(self._coming)
        self._coming_step = step
        for key, (table, part) in self._parts.items():
            ids = part.of(batches)
            if ids is not None and ids.numel():
                unique, places = distinct_of(ids)  # what is computed meanwhile may change the batch
                self._coming[key] = _Ahead(ids.clone(), unique, places, self._ask(table, unique, step))

    def begin(self, batches: Sequence[Batch], step: int) -> None:
        """A step begins, with these."""
        self._forget(self._now)
        if step != self._coming_step:
            self._forget(self._coming)
        self._now, self._coming = self._coming, {}
        self._batches, self._num_asked = batches, {}

    def find(self, module: nn.Module, table: str, ids: Tensor) -> tuple[Ids, Places, Weights] | None:
        """The distinct ids, the place of each among them, and their rows, if they have been asked for."""
        number = self._num_asked.get(module, 0)
        self._num_asked[module] = number + 1
        ahead = self._now.pop((module, number), None)
        if ahead is not None and ahead.ids.shape == ids.shape and equal(ahead.ids, ids):
            self.num_found += 1
            return ahead.unique, ahead.places, self._rows(ahead.pulling)
        if ahead is not None:
            self._drop(ahead.pulling)
        part = _part(self._batches, ids)
        if part is None:
            self._parts.pop((module, number), None)
        else:
            self._parts[module, number] = table, part
        return None

    def clear(self) -> None:
        """Forget what was asked for ahead."""
        self._forget(self._now)
        self._forget(self._coming)

    def _forget(self, entries: dict[tuple[nn.Module, int], _Ahead]) -> None:
        for ahead in entries.values():
            self._drop(ahead.pulling)
        entries.clear()


def distinct_of(ids: Tensor) -> tuple[Ids, Places]:
    """Those of a tensor, and the place of each among them."""
    return distinct(np.ascontiguousarray(ids.detach().cpu().numpy().reshape(-1), np.int64))


def _tensors(batch: Batch) -> Sequence[Tensor]:
    return list(batch.values()) if isinstance(batch, Mapping) else batch


def _part(batches: Sequence[Batch], ids: Tensor) -> _Part | None:
    """Which part of which batch these are, if they are one."""
    for number, batch in enumerate(batches):
        for position, whole in enumerate(_tensors(batch)):
            if not whole.dim() or not ids.dim() or whole.dtype != ids.dtype or len(whole) != len(ids):
                continue
            start = (ids.data_ptr() - whole.data_ptr()) // ids.element_size()
            if ids.stride(0) == whole.stride(0) and 0 <= start < whole.stride(0) and _shares(ids, whole):
                return _Part(number, position, _like(whole), start, tuple(ids.shape[1:]), ids.stride())
    return None


def _like(whole: Tensor) -> tuple[object, ...]:
    return whole.dtype, whole.shape[1:], whole.stride()


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
