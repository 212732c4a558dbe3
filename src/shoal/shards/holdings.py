"""What a shard holds: its buckets, each in one journal. One journal is the rule; buckets that have moved here come with
one of their own, for their book is that of the shard that they come from."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError
from shoal.shards import messages as msg
from shoal.tables import TableSpec
from shoal.tables.batches import by_owner
from shoal.tables.book import Verdict
from shoal.tables.files import write_whole
from shoal.tables.frame import Begin, Push
from shoal.tables.journal import Journal, Keeping, restricted
from shoal.tables.spec import NUM_BUCKETS
from shoal.tables.stored import unpacked
from shoal.tables.table import Mask

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]


class Entry(msgspec.Struct, frozen=True):
    """A journal's folder within the shard's, and its buckets (4096 bits)."""

    folder: str
    buckets: bytes


class Held(msgspec.Struct, frozen=True):
    """What was held when a step was marked, and the map of buckets of then."""

    map: msg.Map
    entries: list[Entry]


def held_at(folder: Path) -> dict[int, Held]:
    """By step, of a shard's folder."""
    path = folder / "held"
    return msgspec.msgpack.decode(path.read_bytes(), type=dict[int, Held]) if path.exists() else {}


@dataclass
class Holding:
    """Some buckets (4096,) and their journal."""

    folder: str
    buckets: Mask
    journal: Journal


class Holdings:
    """All that a shard holds. ``mine``: the buckets that it begins with, if its folder does not say otherwise."""

    def __init__(self, folder: Path, specs: Sequence[TableSpec], keeping: Keeping, mine: Mask) -> None:
        self._folder = folder
        self._specs = specs
        self._keeping = keeping
        self.marked = held_at(folder)
        self._past: set[str] = set()
        self.all = self._opened(self._entries() or [Entry(".", np.packbits(mine).tobytes())])
        self._deal()

    def _opened(self, entries: Sequence[Entry]) -> list[Holding]:
        return [
            Holding(e.folder, unpacked(e.buckets), Journal(self._folder / e.folder, self._specs, self._keeping))
            for e in entries
        ]

    def _present(self) -> list[Entry]:
        return [Entry(holding.folder, np.packbits(holding.buckets).tobytes()) for holding in self.all]

    def _entries(self) -> list[Entry]:
        path = self._folder / "holdings.json"
        return msgspec.json.decode(path.read_bytes(), type=list[Entry]) if path.exists() else []

    def _deal(self) -> None:
        self._holder = np.full(NUM_BUCKETS, -1, np.int32)
        for number, holding in enumerate(self.all):
            self._holder[holding.buckets] = number

    @property
    def held(self) -> Mask:
        """(4096,) the buckets that it holds."""
        found: Mask = self._holder >= 0
        return found

    @property
    def specs(self) -> Mapping[str, TableSpec]:
        return {spec.name: spec for spec in self._specs}

    @property
    def main(self) -> Journal:
        """The first."""
        return self.all[0].journal

    # Pulls and pushes

    @property
    def step(self) -> int:
        """So many steps all lanes have done, in all of it."""
        return min(holding.journal.applier.step for holding in self.all)

    def is_ready(self, step: int) -> bool:
        """Whether a read for this step may be answered."""
        return all(holding.journal.applier.is_ready(step) for holding in self.all)

    def pull(self, table: str, ids: Ids, step: int) -> Weights:
        """(n,) ids -> (n, dim) float32."""
        if len(self.all) == 1 or table not in self.specs:  # the journal says which there are
            return self.main.pull(table, ids, step)
        order, starts = by_owner(ids, np.maximum(self._holder, 0), len(self.all))
        out = np.empty((len(ids), self.specs[table].dim), np.float32)
        for number, holding in enumerate(self.all):
            own = order[starts[number] : starts[number + 1]]
            out[own] = holding.journal.pull(table, ids[own], step)
        return out

    def push(self, push: Push, worker: str) -> Verdict:
        """Take what is new of a push, or nothing of one that is amiss or a zombie's; see ``Journal.push``."""
        if len(self.all) == 1:
            return self.main.push(push, worker)
        parts = [restricted(push, holding.buckets) for holding in self.all]
        pairs = list(zip(self.all, parts, strict=True))
        verdicts = [holding.journal.applier.judge(part) for holding, part in pairs]
        for worst in (Verdict.ZOMBIE, Verdict.AMISS):
            if worst in verdicts:
                return worst
        for (holding, part), verdict in zip(pairs, verdicts, strict=True):
            if verdict is Verdict.NEW:
                holding.journal.check(part, worker)
        for holding, part in pairs:
            holding.journal.push(part, worker)
        return Verdict.NEW if Verdict.NEW in verdicts else Verdict.KNOWN

    def begin(self, begin: Begin) -> Verdict:
        """Let a generation begin in all of it, or in none."""
        verdicts = [holding.journal.can_begin(begin) for holding in self.all]
        for worst in (Verdict.ZOMBIE, Verdict.AMISS):
            if worst in verdicts:
                return worst
        for holding in self.all:
            holding.journal.begin(begin)
        return Verdict.NEW if Verdict.NEW in verdicts else Verdict.KNOWN

    def books(self) -> list[dict[int, int]]:
        """For each journal, how many steps of each lane have come."""
        return [holding.journal.applier.cursors() for holding in self.all]

    # What is kept

    def mark(self, step: int, keep: Collection[int], told: msg.Map) -> None:
        """Remember how it stands, and what of; see ``Journal.mark``."""
        for holding in self.all:
            holding.journal.mark(step, keep)
        newest = max(keep, default=-1)
        kept = {known: held for known, held in self.marked.items() if known in keep or known > newest}
        self.marked = kept | {step: Held(told, self._present())}
        write_whole(self._folder / "held", msgspec.msgpack.encode(self.marked))
        self._clear_up()

    def _clear_up(self) -> None:
        """Delete journals that are held no more, and were not when anything was marked that may be returned to."""
        wanted = {entry.folder for held in self.marked.values() for entry in held.entries}
        for folder in self._past - wanted - {"."}:
            shutil.rmtree(self._folder / folder, ignore_errors=True)
            self._past.discard(folder)

    def return_to(self, step: int) -> None:
        """Hold what was held when a step was marked, as it was; nothing, if that is not known."""
        for holding in self.all:
            holding.journal.close()
            self._past.add(holding.folder)
        self.all = []
        held = self.marked.get(step)
        self.all = self._opened(held.entries if held is not None else [])
        for holding in self.all:
            holding.journal.return_to(step)
            self._past.discard(holding.folder)
        self.all = self.all or self._opened([Entry(".", bytes(NUM_BUCKETS // 8))])
        self.marked = {known: held for known, held in self.marked.items() if known <= step}
        write_whole(self._folder / "held", msgspec.msgpack.encode(self.marked))
        self.write()

    def close(self) -> None:
        for holding in self.all:
            holding.journal.close()

    # Moves

    def of(self, buckets: Mask) -> Holding:
        """The one that has these buckets. ``ConfigError`` if none has all of them."""
        found = next((holding for holding in self.all if not (buckets & ~holding.buckets).any()), None)
        if found is None or not buckets.any():
            raise ConfigError("these buckets are not in one journal of this shard")
        return found

    def receive(self, folder: str) -> Journal:
        """A journal for buckets that are going to come; one that is there from an attempt before is begun anew."""
        path = self._folder / folder
        for file in path.glob("*"):
            file.unlink()
        return Journal(path, self._specs, self._keeping)

    def add(self, folder: str, buckets: Mask, journal: Journal) -> None:
        """Hold these from now on."""
        empty = [holding for holding in self.all if not holding.buckets.any()]
        self.all = [holding for holding in self.all if holding.buckets.any()]
        self.all.append(Holding(folder, buckets, journal))
        self.write()
        for holding in empty:  # its book is of nothing that is pushed here
            holding.journal.close()
            self._past.add(holding.folder)

    def reopen(self, folder: str) -> Journal:
        """The journal of buckets that were coming when this process was started in another's place. ``ConfigError`` if
        there is none."""
        if not (self._folder / folder).is_dir():
            raise ConfigError(f"nothing of {folder} is here; begin with its first part")
        return Journal(self._folder / folder, self._specs, self._keeping)

    def give_up(self, buckets: Mask) -> None:
        """Hold these no longer."""
        for holding in self.all:
            holding.buckets = holding.buckets & ~buckets
        self.write()

    def write(self) -> None:
        """Have the folder say what is held."""
        self._deal()
        write_whole(self._folder / "holdings.json", msgspec.json.encode(self._present()))
