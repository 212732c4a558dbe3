"""Tables that outlive their process: a snapshot, and a log of the pushes since. A shard without its network.

Of the snapshots in its folder (see ``stored``) the newest counts, with its log; a log without its snapshot, a snapshot
that was not finished, and what no mark needs, are removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from shoal.errors import ConfigError, Diverged, ShoalError, StoreFault
from shoal.tables.applying import applier_for
from shoal.tables.batches import buckets_of
from shoal.tables.book import Verdict
from shoal.tables.consistency import NOW, Async, Consistency, Durability, Sync
from shoal.tables.files import flush, locked
from shoal.tables.frame import Begin, Drop, Entry, Import, Part, Push
from shoal.tables.log import Log, Torn, read_records
from shoal.tables.spec import TableSpec
from shoal.tables.stored import JournalFolder, packed, read_snapshot, replay, take
from shoal.tables.table import Mask, Table


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How tables are kept. ``durability``: ``log`` has a push in the log before it is acknowledged, so that a process
    that is killed loses nothing (so has ``replica``, and a shard sees to the rest); ``snapshot`` loses what came after
    the last one. ``num_lanes``: of the job that
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
        self.keeping = keeping
        self._folder = JournalFolder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(folder)
        try:
            self._folder.check(specs, keeping.num_lanes)
            self.tables = {spec.name: Table(spec, keeping.memory_bytes) for spec in specs}
            if self._folder.contents() is None:
                in_step = isinstance(keeping.consistency, Sync)
                self._folder.write_contents(specs, keeping.num_lanes, in_step=in_step)
            self._open()
        except BaseException:
            os.close(self._lock)
            raise
        self._remove_older()

    def _open(self) -> None:
        """Stand where the disk says."""
        for table in self.tables.values():
            table.clear()
        self.applier = applier_for(self.keeping.consistency, self.tables, self.keeping.num_lanes)
        self._number = max((number for number, _ in self._folder.numbered("snapshot-")), default=0)
        self._marks = self._folder.marks()
        if self._number:
            read_snapshot(self._folder.snapshot(self._number), self.tables, self.applier)
        self._log = Log(self._folder.log(self._number))
        self.torn: Torn | None = self._log.torn
        replay(self._log.records(), self.tables, self.applier)

    # Pushes and pulls

    def pull(self, table: str, ids: npt.NDArray[np.int64], step: int = NOW) -> npt.NDArray[np.float32]:
        """(n,) ids -> (n, dim) float32, for a ``step`` that the applier ``is_ready`` for, or the newest."""
        return self.applier.pull(self._table(table), ids, step)

    def push(self, push: Push, worker: str = "") -> Verdict:
        """Take a push if it is new; the verdict says whether it was. ``NEW`` and ``KNOWN`` may be acknowledged.

        ``ConfigError`` and ``Diverged`` (naming ``worker`` and the lanes) for one that cannot be applied,
        ``StoreFault`` if the log takes no more: it was not taken, then, and may be sent again.
        """
        verdict = self.applier.judge(push)
        if verdict is Verdict.NEW:
            self.check(push, worker)
            self.applier.check(push)
            self._keep(push)
            self.applier.take(push)
        return verdict

    def begin(self, begin: Begin) -> Verdict:
        """Let a generation begin, if it is new; from a mark, if the tables have gone on since. ``AMISS`` if they cannot
        stand at its base. ``StoreFault`` if the log takes no more."""
        verdict = self.applier.may_begin(begin)
        if verdict is Verdict.AMISS and (begin.base in self._marks or begin.base == 0):
            self.return_to(begin.base)
            verdict = self.applier.may_begin(begin)
        if verdict is Verdict.NEW:
            self._keep(begin)
            self.applier.begin(begin)
        return verdict

    def check(self, push: Push, worker: str = "") -> None:
        """``ConfigError`` and ``Diverged`` for a push that cannot be applied."""
        for part in push.parts:
            self._check(part, push, worker)

    # Buckets that move

    def hand_over(self, buckets: Mask, since: Mapping[str, int]) -> Import:
        """What it holds of some buckets (4096,), touched since an operation of each table."""
        with self._withdrawn():  # or what is taken back later would have been handed over
            images = {name: table.image_in(buckets, since.get(name, -1)) for name, table in self.tables.items()}
        return packed(images)

    def let_go(self, buckets: Mask, since: Mapping[str, int]) -> tuple[Import, list[Push]]:
        """The last of some buckets, with how the applier stands, and the pushes that may still be taken back. From now
        on none of their ids may be pushed here."""
        with self._withdrawn() as pushes:
            images = {name: table.image_in(buckets, since.get(name, -1)) for name, table in self.tables.items()}
            return packed(images, self.applier.record()), [restricted(push, buckets) for push in pushes]

    @contextmanager
    def _withdrawn(self, base: int | None = None) -> Iterator[Sequence[Push]]:
        """Within this the tables are as they were before what may still be taken back, which it gives."""
        pushes = self.applier.withdraw(base)
        try:
            yield pushes
        finally:
            for push in pushes:
                self.applier.take(push)

    def take_over(self, entry: Import, pushes: Sequence[Push] = ()) -> None:
        """Take what another journal handed over. ``StoreFault`` if the log takes no more."""
        self._keep(entry)
        take(entry, self.tables, self.applier)
        for push in pushes:
            self._keep(push)
            self.applier.take(push)

    def drop(self, buckets: Mask) -> None:
        """Forget what was handed over."""
        entry = Drop(np.packbits(buckets).tobytes())
        self._keep(entry)
        take(entry, self.tables, self.applier)

    def _keep(self, entry: Push | Entry) -> None:
        if self.keeping.durability != "snapshot":
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

    # Marks

    def mark(self, step: int, keep: Collection[int] = ()) -> None:
        """Remember how it stands, for a generation that begins at ``step``, and forget what was marked before but for
        ``keep``. It costs no copy: a snapshot that is there already and a part of its log make up a mark; only without
        a log is a snapshot taken. ``ConfigError`` for a step that the tables do not stand at; ``StoreFault``."""
        most = step + 1 if isinstance(self.keeping.consistency, Sync) else self.applier.step
        if not step <= self.applier.step <= most:
            raise ConfigError(f"the tables are at step {self.applier.step}, and step {step} was to be marked")
        if self.keeping.durability != "snapshot":
            self._log.flush()
        else:
            self.snapshot(step)
        newest = max(keep, default=-1)  # what is newer is still being stored
        kept = {known: where for known, where in self._marks.items() if known in keep or known > newest}
        self._marks = kept | {step: (self._number, self._log.num_bytes)}
        self._folder.write_marks(self._marks)
        self._remove_older()

    def can_begin(self, begin: Begin) -> Verdict:
        """What ``begin`` would say, without anything being done."""
        verdict = self.applier.may_begin(begin)
        may_return = begin.base in self._marks or begin.base == 0
        return Verdict.NEW if verdict is Verdict.AMISS and may_return else verdict

    def return_to(self, step: int) -> None:
        """Stand at a mark, or where nothing has been pushed yet. ``StoreFault`` if there is no such mark."""
        if step and step not in self._marks:
            raise StoreFault(f"{self._folder.path} does not hold the tables of step {step}")
        number, until = self._marks.get(step, (0, 0))
        for table in self.tables.values():
            table.clear()
        self.applier = applier_for(self.keeping.consistency, self.tables, self.keeping.num_lanes)
        try:
            if number:
                read_snapshot(self._folder.snapshot(number), self.tables, self.applier)
            if until:
                replay(read_records(self._folder.log(number), until), self.tables, self.applier)
            self.snapshot()
        except ShoalError:
            self._log.close()
            self._open()
            raise
        self._marks = {known: where for known, where in self._marks.items() if known <= step}
        self._folder.write_marks(self._marks)

    # What is kept

    @property
    def num_bytes(self) -> int:
        """How much the tables take."""
        return sum(table.stats.num_bytes for table in self.tables.values())

    @property
    def log_bytes(self) -> int:
        """How long the log is."""
        return self._log.num_bytes

    def snapshot(self, base: int | None = None) -> Path:
        """Keep all of it as it is now, and begin a new log; ``base``: without a log, only what was there at that step.
        ``StoreFault`` if that cannot be written: the snapshot and the log before it still hold everything."""
        with self._withdrawn(base) as pushes:
            return self._snapshot(pushes)

    def _snapshot(self, withdrawn: Sequence[Push]) -> Path:
        """What was withdrawn begins the new log."""
        number = self._number + 1
        arrays: dict[str, npt.NDArray[Any]] = {}
        meta: dict[str, Any] = {}
        for name, table in self.tables.items():
            image = table.image()
            meta[name] = image.meta()
            arrays |= {f"{name}/{key}": array for key, array in image.arrays().items()}
        path, log_path = self._folder.snapshot(number), self._folder.log(number)
        partial = path.with_suffix(".partial")
        log_path.unlink(missing_ok=True)  # of an attempt that failed
        log: Log | None = None
        try:
            save_file(arrays, partial, {"tables": json.dumps(meta), "applier": json.dumps(self.applier.record())})
            flush(partial)
            log = Log(log_path)  # there before its snapshot counts
            for push in withdrawn if self.keeping.durability != "snapshot" else ():
                log.append(*push.encode())
            partial.replace(path)
            flush(self._folder.path)
        except (OSError, SafetensorError, StoreFault) as error:
            if log is not None:
                log.close()
            for file in (partial, path, log_path):
                file.unlink(missing_ok=True)
            raise StoreFault(f"the snapshot {path} could not be written: {error}") from None
        self._log.close()
        self._log, self._number = log, number
        self._remove_older()
        return path

    def close(self) -> None:
        """Nothing more will be pushed."""
        self._log.close()
        os.close(self._lock)

    def _remove_older(self) -> None:
        wanted = {self._number, *(number for number, _ in self._marks.values())}
        for number, path in (*self._folder.numbered("snapshot-"), *self._folder.numbered("log-")):
            if number not in wanted:
                path.unlink()
        for path in self._folder.path.glob("*.partial"):
            path.unlink()


def restricted(push: Push, buckets: Mask) -> Push:
    """A push with the ids of some buckets (4096,) alone: of the same lanes, be it empty."""
    parts = []
    for part in push.parts:
        own = buckets[buckets_of(part.ids)]
        parts.append(Part(part.table, part.ids[own], part.gradients[own]))
    return Push(push.generation, push.lanes, parts, push.now_s)
