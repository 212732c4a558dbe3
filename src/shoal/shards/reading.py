"""Tables of a run that has stored them, for who reads and does not train: evaluation, prediction, a look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from shoal.errors import StoreFault
from shoal.shards.embedding import embeddings_of
from shoal.shards.holdings import Entry, held_at
from shoal.tables.batches import by_owner
from shoal.tables.spec import NUM_BUCKETS
from shoal.tables.stored import Followed, unpacked
from shoal.tables.table import Table


class StoredTables:
    """The tables of some shards' folders as of a version, put together by what each held then. ``StoreFault`` if that
    is not all."""

    def __init__(self, folders: Sequence[Path], step: int) -> None:
        self._folders = folders
        self._held = _held(folders, step)
        self._followed: list[Followed] = []
        self._parts: list[dict[str, Table]] = []
        self._owners = np.full(NUM_BUCKETS, -1, np.int32)
        for folder, entries in self._held:
            for entry in entries:
                own = unpacked(entry.buckets) & (self._owners < 0)
                if not own.any():
                    continue
                followed = Followed(folder / entry.folder, step)
                for table in followed.tables.values():
                    table.drop(~own)
                self._owners[own] = len(self._parts)
                self._followed.append(followed)
                self._parts.append(followed.tables)
        missing = int((self._owners < 0).sum())
        if missing:
            where = ", ".join(str(folder) for folder in folders)
            raise StoreFault(f"{where} does not hold the tables of step {step}: {missing} of their buckets are missing")

    def advance(self, step: int) -> bool:
        """Stand at a later version, by what has come since. False if that is not there, or buckets have moved, or it
        could not be read: then the tables are to be read anew, for these may be of several versions."""
        try:
            return _held(self._folders, step) == self._held and all(one.advance(step) for one in self._followed)
        except StoreFault:
            return False

    def pull(self, table: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(n,) ids -> (n, dim) float32."""
        order, starts = by_owner(ids, self._owners, len(self._parts))
        out = np.empty((len(ids), self._parts[0][table].spec.dim), np.float32)
        for number, part in enumerate(self._parts):
            own = order[starts[number] : starts[number + 1]]
            out[own] = part[table].pull(ids[own])
        return out

    def tables(self, name: str) -> list[Table]:
        """The parts of a table, one a journal."""
        return [part[name] for part in self._parts]


def _held(folders: Sequence[Path], step: int) -> list[tuple[Path, list[Entry]]]:
    """What each folder's shard held at a step."""
    found = [(folder, held_at(folder).get(step)) for folder in folders]
    return [(folder, held.entries) for folder, held in found if held is not None]


def stored_tables(run: Path, step: int) -> StoredTables:
    """Those of a run's folder. ``StoreFault`` if it has none, or none of that version."""
    folders = sorted((run / "shards").glob("s*"), key=lambda folder: int(folder.name[1:]))
    if not folders:
        raise StoreFault(f"{run} has no table shards; are they on other hosts? copy its folder shards from there")
    return StoredTables(folders, step)


def attach(model: nn.Module, run: Path, step: int) -> None:
    """Have a model's embeddings read a run's tables of a version."""
    source = stored_tables(run, step)
    for module in embeddings_of(model):
        module.source = source
