"""Tables of a run that has stored them, for who reads and does not train: evaluation, prediction, a look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from shoal.errors import StoreFault
from shoal.shards.embedding import embeddings_of
from shoal.tables.batches import by_owner
from shoal.tables.buckets import BucketMap
from shoal.tables.stored import tables_at
from shoal.tables.table import Table


class StoredTables:
    """The tables of some shards' folders as of a version, put together by the map of buckets."""

    def __init__(self, folders: Sequence[Path], step: int) -> None:
        self._buckets = BucketMap.even([folder.name for folder in folders])
        self._shards: list[Mapping[str, Table]] = [tables_at(folder, step) for folder in folders]

    def pull(self, table: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(n,) ids -> (n, dim) float32."""
        order, starts = by_owner(ids, self._buckets.owners, len(self._shards))
        out = np.empty((len(ids), self._shards[0][table].spec.dim), np.float32)
        for number, shard in enumerate(self._shards):
            own = order[starts[number] : starts[number + 1]]
            out[own] = shard[table].pull(ids[own])
        return out

    def tables(self, name: str) -> list[Table]:
        """The parts of a table, one a shard."""
        return [shard[name] for shard in self._shards]


def stored_tables(run: Path, step: int) -> StoredTables:
    """Those of a run's folder. ``StoreFault`` if it has none, or none of that version."""
    if any(path.exists() for path in (run / "shards").glob("s*/holdings.json")):
        raise StoreFault(f"buckets of {run} have moved between its shards, and versions do not tell where they were")
    folders = sorted((run / "shards").glob("s*"), key=lambda folder: int(folder.name[1:]))
    if not folders:
        raise StoreFault(f"{run} has no table shards; are they on other hosts? copy its folder shards from there")
    return StoredTables(folders, step)


def attach(model: nn.Module, run: Path, step: int) -> None:
    """Have a model's embeddings read a run's tables of a version."""
    source = stored_tables(run, step)
    for module in embeddings_of(model):
        module.source = source
