"""Tables that outlive their process: a snapshot, and a log of the pushes since. A shard without its network.

In the folder: ``snapshot-N.safetensors`` (all tables and the book at one moment) and ``log-N`` (what came after). The
newest snapshot counts; a log without its snapshot, or a snapshot that was not finished, is removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from shoal.errors import ConfigError, Diverged, StoreFault
from shoal.tables.applying import NOW, applier_for
from shoal.tables.book import Verdict
from shoal.tables.consistency import Async, Consistency
from shoal.tables.frame import Begin, Part, Push, decode
from shoal.tables.image import Image
from shoal.tables.log import Log, Torn
from shoal.tables.spec import TableSpec
from shoal.tables.table import Table

Durability = Literal["snapshot", "log"]


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How tables are kept. ``durability``: ``log`` has a push in the log before it is acknowledged, so that a process
    that is killed loses nothing; ``snapshot`` loses what came after the last one. ``num_lanes``: of the job that
    pushes. ``memory_bytes``: the budget of each table; None: half of the machine's."""

    consistency: Consistency = field(default_factory=Async)
    num_lanes: int = 1
    durability: Durability = "log"
    memory_bytes: int | None = None


class Journal:
    """Some tables, how pushes to them are applied, and where all of that is kept.

    Opening it again goes on from there: ``torn`` is what a crash has left of a push that was never acknowledged.
    ``ConfigError`` if what is kept is of other tables.
    """

    def __init__(self, folder: Path, specs: Sequence[TableSpec], keeping: Keeping) -> None:
        if len({spec.name for spec in specs}) < len(specs):
            raise ConfigError(f"two tables have one name: {sorted(spec.name for spec in specs)}")
        self.tables = {spec.name: Table(spec, keeping.memory_bytes) for spec in specs}
        self.applier = applier_for(keeping.consistency, self.tables, keeping.num_lanes)
        self.keeping = keeping
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._number = max((number for number, _ in self._kept("snapshot-")), default=0)
        if self._number:
            self._read(self._snapshot_path(self._number))
        self._log = Log(self._log_path(self._number))
        self.torn: Torn | None = self._log.torn
        for body in self._log.records():
            entry = decode(body)
            if isinstance(entry, Begin):
                self.applier.begin(entry)
            else:
                self.applier.take(entry)
        self._remove_older()

    # Pushes and pulls

    def pull(self, table: str, ids: npt.ArrayLike, step: int = NOW) -> npt.NDArray[np.float32]:
        """(n,) ids -> (n, dim) float32, for a ``step`` that the applier ``is_ready`` for, or the newest."""
        found = self._table(table)
        return self.applier.pull(found, found.check_ids(ids), step)

    def push(self, push: Push, worker: str = "") -> Verdict:
        """Take a push if it is new; the verdict says whether it was. ``NEW`` and ``KNOWN`` may be acknowledged.

        ``ConfigError`` and ``Diverged`` (naming ``worker`` and the lanes) for one that cannot be applied,
        ``StoreFault`` if the log takes no more: it was not taken, then, and may be sent again.
        """
        verdict = self.applier.judge(push)
        if verdict is Verdict.NEW:
            for part in push.parts:
                self._check(part, push, worker)
            self._keep(push)
            self.applier.take(push)
        return verdict

    def begin(self, begin: Begin) -> Verdict:
        """Let a generation begin, if it is new. ``StoreFault`` if the log takes no more."""
        verdict = self.applier.may_begin(begin)
        if verdict is Verdict.NEW:
            self._keep(begin)
            self.applier.begin(begin)
        return verdict

    def _keep(self, entry: Push | Begin) -> None:
        if self.keeping.durability == "log":
            self._log.append(*entry.encode())

    def _check(self, part: Part, push: Push, worker: str) -> None:
        table = self._table(part.table)
        table.check_ids(part.ids)
        try:
            table.check_gradients(part.ids, part.gradients)
        except Diverged as error:
            who = f"worker {worker}, " if worker else ""
            raise Diverged(f"{error} ({who}lanes {sorted(push.lanes)})") from None

    def _table(self, name: str) -> Table:
        if name not in self.tables:
            raise ConfigError(f"there is no table {name!r}; there are {', '.join(self.tables)}")
        return self.tables[name]

    # What is kept

    @property
    def num_bytes(self) -> int:
        """How much the tables take."""
        return sum(table.stats.num_bytes for table in self.tables.values())

    @property
    def log_bytes(self) -> int:
        """How long the log is."""
        return self._log.num_bytes

    def snapshot(self) -> Path:
        """Keep all of it as it is now, and begin a new log. ``StoreFault`` if that cannot be written: the snapshot and
        the log before it still hold everything."""
        withdrawn = self.applier.withdraw()
        try:
            return self._snapshot(withdrawn)
        finally:
            for push in withdrawn:
                self.applier.take(push)

    def _snapshot(self, withdrawn: Sequence[Push]) -> Path:
        """What was withdrawn begins the new log."""
        number = self._number + 1
        arrays: dict[str, npt.NDArray[Any]] = {}
        meta: dict[str, Any] = {}
        for name, table in self.tables.items():
            image = table.image()
            meta[name] = image.meta()
            arrays |= {f"{name}/{key}": array for key, array in image.arrays().items()}
        path = self._snapshot_path(number)
        partial = path.with_suffix(".partial")
        try:
            save_file(arrays, partial, {"tables": json.dumps(meta), "applier": json.dumps(self.applier.record())})
            _flush(partial)
            log = Log(self._log_path(number))  # there before its snapshot counts
            for push in withdrawn if self.keeping.durability == "log" else ():
                log.append(*push.encode())
            partial.replace(path)
            _flush(self._folder)
        except (OSError, SafetensorError, StoreFault) as error:
            partial.unlink(missing_ok=True)
            raise StoreFault(f"the snapshot {path} could not be written: {error}") from None
        self._log.close()
        self._log, self._number = log, number
        self._remove_older()
        return path

    def close(self) -> None:
        """Nothing more will be pushed."""
        self._log.close()

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "np") as file:
                meta: dict[str, Any] = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            standing, kept = meta["applier"], meta["tables"]
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise StoreFault(f"the snapshot {path} cannot be read: {error}") from None
        if set(kept) != set(self.tables):
            raise ConfigError(f"{path} is of the tables {sorted(kept)}, not of {sorted(self.tables)}")
        for name, table in self.tables.items():
            own = {key.removeprefix(f"{name}/"): a for key, a in arrays.items() if key.rpartition("/")[0] == name}
            table.apply(Image.of(kept[name], own))
        self.applier.read(standing)

    def _kept(self, prefix: str) -> list[tuple[int, Path]]:
        found = []
        for path in self._folder.glob(f"{prefix}*"):
            number = path.name.removeprefix(prefix).removesuffix(".safetensors")
            if number.isdecimal():
                found.append((int(number), path))
        return found

    def _remove_older(self) -> None:
        for number, path in (*self._kept("snapshot-"), *self._kept("log-")):
            if number != self._number:
                path.unlink()
        for path in self._folder.glob("snapshot-*.partial"):
            path.unlink()

    def _snapshot_path(self, number: int) -> Path:
        return self._folder / f"snapshot-{number}.safetensors"

    def _log_path(self, number: int) -> Path:
        return self._folder / f"log-{number}"


def _flush(path: Path) -> None:
    """Have the disk take a file, or what a folder says of its files."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
