"""A worker's part of a run with tables: where its embeddings' rows come from, and where their gradients go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from shoal.comm.keys import JobKey
from shoal.errors import Diverged
from shoal.shards.client import Client, Pushing
from shoal.shards.embedding import embeddings_of, parts_of, specs_of
from shoal.tables.buckets import BucketMap
from shoal.tables.frame import Push


class TableSession:
    """Serves the embeddings of ``model`` from shards at ``addresses``. One step at a time: ``step`` is the one that
    pulls are for; ``push`` what backward left, ``settle``, and go on."""

    def __init__(self, model: nn.Module, key: JobKey, addresses: Mapping[str, str], worker: str, *, half: bool) -> None:
        self.step = 0
        self._modules = embeddings_of(model)
        self._client = Client(key, BucketMap.even(sorted(addresses)), addresses, worker=worker, half=half)
        self._pushing: Pushing | None = None
        self._is_open = False
        self._generation = 0
        for module in self._modules:
            module.source = self

    def begin(self, generation: int, base: int) -> None:
        """Take part in a generation from step ``base`` on, where the shards then stand. ``Fault`` if they cannot."""
        if not self._is_open:
            self._client.open(specs_of(self._modules))
            self._is_open = True
        self._pushing, self._generation, self.step = None, generation, base
        self._client.begin(generation, base)
        parts_of(self._modules)  # what an interrupted step has left

    def pull(self, table: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return self._client.pull(table, ids, self.step)

    def push(self, lanes: Sequence[int], *, keep: bool = True) -> None:
        """Send this step's gradients of these lanes; ``keep=False``: none, for they are no numbers."""
        parts = parts_of(self._modules)
        if lanes:
            spans = dict.fromkeys(lanes, (self.step, self.step + 1))
            self._pushing = self._client.send(Push(self._generation, spans, parts if keep else []))

    def settle(self) -> Diverged | None:
        """Wait until the shards have this step's: what they refuse it for, if it is not finite. ``Fault``."""
        pushing, self._pushing = self._pushing, None
        if pushing is None:
            return None
        try:
            self._client.settle(pushing)
        except Diverged as error:
            return error
        return None

    def mark(self, step: int, keep: Collection[int]) -> None:
        """Have the shards remember step ``step``, and those of ``keep``."""
        self._client.mark(step, keep)

    def figures(self) -> dict[str, Any]:
        """What each shard tells of itself."""
        return {
            name: {"step": standing.step, **standing.figures} for name, standing in self._client.standings().items()
        }  # fmt: skip

    def close(self) -> None:
        self._client.close()
