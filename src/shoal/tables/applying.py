"""What becomes of pushes to tables, by consistency: when they are applied, and which reads may see them. No disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError, Diverged, Fault
from shoal.tables.batches import distinct, sums
from shoal.tables.book import Book, Verdict
from shoal.tables.consistency import ANYWHERE, NOW, Async, Bounded, Consistency, Sync
from shoal.tables.frame import Begin, Push
from shoal.tables.image import Image
from shoal.tables.table import Table

Weights = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def applier_for(consistency: Consistency, tables: Mapping[str, Table], num_lanes: int) -> Applier:
    """What carries a consistency out."""
    match consistency:
        case Sync():
            return InStep(tables, num_lanes)
        case Bounded(steps):
            return AtOnce(tables, num_lanes, steps)
        case Async():
            return AtOnce(tables, num_lanes, None)


_EXPIRIES = 8


class Expiry:
    """When a table's ids expire: each time that event time passes another eighth of ``expire_after_s``, at that moment
    and no other, so that the same pushes in the same order remove the same ids."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self._eighths = {
            name: max(1, table.spec.expire_after_s // _EXPIRIES)
            for name, table in tables.items()
            if table.spec.expire_after_s is not None
        }
        self.passed: dict[str, int] = {}

    def due(self, now_s: int) -> dict[str, int]:
        """For which tables, and with which moment, ``expire`` is due."""
        moments = {name: now_s // eighth * eighth for name, eighth in self._eighths.items()}
        return {name: moment for name, moment in moments.items() if moment > self.passed.get(name, 0)}

    def done(self, due: Mapping[str, int]) -> None:
        """They have expired."""
        self.passed = {**self.passed, **due}


class AtOnce:
    """A push is applied as it comes. ``bound``: how many steps a read may be ahead of the lane that is furthest behind;
    None: any."""

    def __init__(self, tables: Mapping[str, Table], num_lanes: int, bound: int | None) -> None:
        self._tables = tables
        self._num_lanes = num_lanes
        self._bound = bound
        self._expiry = Expiry(tables)
        self.book = Book()

    @property
    def step(self) -> int:
        """So many steps all lanes have done."""
        return self.book.least(self._num_lanes)

    @property
    def generation(self) -> int:
        return self.book.generation

    def cursors(self) -> dict[int, int]:
        """So many steps of each lane have come."""
        return dict(self.book.cursors)

    def judge(self, push: Push) -> Verdict:
        """What becomes of it."""
        return self.book.judge(push.generation, push.lanes)

    def check(self, push: Push) -> None:
        """Each push is by itself."""

    def take(self, push: Push) -> None:
        """Apply a push that is new."""
        for part in push.parts:
            self._tables[part.table].push(part.ids, part.gradients, push.now_s)
        due = self._expiry.due(push.now_s)
        for name, moment in due.items():
            self._tables[name].expire(moment)
        self._expiry.done(due)
        self.book = self.book.after(push.generation, push.lanes)

    def may_begin(self, begin: Begin) -> Verdict:
        """Whether a generation may begin so: ``AMISS`` where the tables cannot stand at its base."""
        if begin.generation < self.generation:
            return Verdict.ZOMBIE
        return Verdict.KNOWN if begin.generation == self.generation else Verdict.NEW

    def begin(self, begin: Begin) -> None:
        """Let a new generation begin."""
        self.book = self.book.begin(begin.generation)

    def is_ready(self, step: int) -> bool:
        """Whether a read for this step may be answered."""
        return self._bound is None or self.step >= step - self._bound

    def pull(self, table: Table, ids: Ids, step: int) -> Weights:
        """(n,) ids -> (n, dim) float32, as that step may see them."""
        return table.pull(ids)

    def withdraw(self, base: int | None = None) -> list[Push]:
        """Nothing: what was applied stays."""
        return []

    def record(self) -> dict[str, Any]:
        """Where it stands, as JSON."""
        cursors = {str(lane): done for lane, done in self.book.cursors.items()}
        return {"generation": self.generation, "cursors": cursors, "expired": self._expiry.passed}

    def read(self, record: Mapping[str, Any]) -> None:
        """Stand where ``record`` says."""
        self.book = Book(record["generation"], {int(lane): done for lane, done in record["cursors"].items()})
        self._expiry.passed = dict(record["expired"])


@dataclass(frozen=True)
class _Done:
    """A step that was applied and may have to be taken back: its pushes, what there was before it, and what reads of
    it see: ids in order, with their weights. ``expired``: what had expired before it."""

    pushes: Sequence[Push]
    expired: dict[str, int]
    before: Mapping[str, Image]
    weights: Mapping[str, tuple[Ids, Weights]]


class InStep:
    """A step's pushes are kept until all lanes' are there, and then summed and applied as one, in the order of lanes.

    Pushes are of the generation that has begun. The step before the newest can still be read and be taken back: for a
    worker may need it to do again what another one was lost with, and a generation may begin from there.
    """

    def __init__(self, tables: Mapping[str, Table], num_lanes: int) -> None:
        self._tables = tables
        self._num_lanes = num_lanes
        self._expiry = Expiry(tables)
        self._stage: list[Push] = []
        self._last: _Done | None = None
        self._ready: tuple[Push, dict[str, tuple[Ids, Weights]]] | None = None
        self.step = 0
        self.generation = 0

    def cursors(self) -> dict[int, int]:
        """So many steps of each lane have come."""
        staged = {lane for push in self._stage for lane in push.lanes}
        return {lane: self.step + (lane in staged) for lane in range(self._num_lanes)}

    def judge(self, push: Push) -> Verdict:
        """What becomes of it."""
        if push.generation != self.generation:
            return Verdict.ZOMBIE if push.generation < self.generation else Verdict.AMISS
        start = min((start for start, _ in push.lanes.values()), default=self.step)
        if any(span != (start, start + 1) for span in push.lanes.values()) or start > self.step:
            return Verdict.AMISS
        if start < self.step:
            return Verdict.KNOWN
        staged = {lane for other in self._stage for lane in other.lanes}
        if not staged & set(push.lanes):
            return Verdict.NEW
        return Verdict.KNOWN if set(push.lanes) <= staged else Verdict.AMISS

    def check(self, push: Push) -> None:
        """``Diverged`` for a push that is new and makes a step's sum that is not finite."""
        if not self._completes(push):
            return
        self._ready = push, self._sums([*self._stage, push])
        for name, (ids, summed) in self._ready[1].items():
            try:
                self._tables[name].check_gradients(ids, summed)
            except Diverged as error:
                raise Diverged(f"{error} (a sum over lanes, of step {self.step})") from None

    def _completes(self, push: Push) -> bool:
        return sum(len(other.lanes) for other in (*self._stage, push)) == self._num_lanes

    def _sums(self, pushes: Sequence[Push]) -> dict[str, tuple[Ids, Weights]]:
        """By table: the distinct ids of a step, and the sum of their gradients in the order of lanes."""
        found = {}
        ordered = sorted(pushes, key=lambda other: min(other.lanes))
        for name in self._tables:
            parts = [part for push in ordered for part in push.parts if part.table == name and len(part.ids)]
            if parts:
                ids, inverse = distinct(np.concatenate([part.ids for part in parts]))
                found[name] = ids, sums(np.concatenate([part.gradients for part in parts]), inverse, len(ids))
        return found

    def take(self, push: Push) -> None:
        """Keep a push that is new, and apply its step if it is complete."""
        completes = self._completes(push)
        self._stage.append(push)
        if completes:
            is_summed = self._ready is not None and self._ready[0] is push
            self._apply(self._stage, self._ready[1] if is_summed and self._ready else self._sums(self._stage))

    def _apply(self, pushes: Sequence[Push], summed_by_table: Mapping[str, tuple[Ids, Weights]]) -> None:
        before, weights = {}, {}
        now_s = max(push.now_s for push in pushes)
        due, passed = self._expiry.due(now_s), self._expiry.passed
        for name in self._tables:
            if name not in summed_by_table and name not in due:
                continue
            table = self._tables[name]
            pushed = summed_by_table[name][0] if name in summed_by_table else np.empty(0, np.int64)
            changing = np.union1d(pushed, table.expiring(due[name])) if name in due else np.sort(pushed)
            before[name] = table.image_of(changing)
            weights[name] = changing, table.pull(changing)
            if name in summed_by_table:
                table.push(*summed_by_table[name], now_s)
            if name in due:
                table.expire(due[name])
        self._expiry.done(due)
        self._last, self._stage, self._ready = _Done(pushes, passed, before, weights), [], None
        self.step += 1

    def may_begin(self, begin: Begin) -> Verdict:
        """Whether a generation may begin so: ``AMISS`` where the tables cannot stand at its base."""
        if begin.generation <= self.generation:
            return Verdict.KNOWN if begin.generation == self.generation else Verdict.ZOMBIE
        is_here = begin.base in (self.step, ANYWHERE) or (begin.base == self.step - 1 and self._last is not None)
        return Verdict.NEW if is_here else Verdict.AMISS

    def begin(self, begin: Begin) -> None:
        """Let a new generation begin."""
        self.generation = begin.generation
        if begin.base != ANYWHERE:
            self._stage = []
            if begin.base < self.step:
                self._undo()

    def _undo(self) -> Sequence[Push]:
        assert self._last is not None
        for name, image in self._last.before.items():
            self._tables[name].set_to(image)
        self._expiry.passed = self._last.expired
        pushes, self._last = self._last.pushes, None
        self.step -= 1
        return pushes

    def is_ready(self, step: int) -> bool:
        """Whether a read for this step may be answered."""
        return step <= self.step

    def pull(self, table: Table, ids: Ids, step: int) -> Weights:
        """(n,) ids -> (n, dim) float32, as that step sees them. ``Fault`` for a step that is gone."""
        rows = table.pull(ids)
        if step in (NOW, self.step):
            return rows
        if step != self.step - 1 or self._last is None:
            raise Fault(f"step {step} cannot be read any more: the tables are at step {self.step}", step=step)
        known, weights = self._last.weights.get(table.spec.name, (ids[:0], rows[:0]))
        if len(known):
            at = np.minimum(np.searchsorted(known, ids), len(known) - 1)
            own = known[at] == ids
            rows[own] = weights[at[own]]
        return rows

    def withdraw(self, base: int | None = None) -> list[Push]:
        """Take back all after step ``base``, by default all that a generation may take back; given to ``take`` again in
        order it is as before."""
        staged, self._stage = self._stage, []
        return [*(self._undo() if self._last is not None and base != self.step else ()), *staged]

    def record(self) -> dict[str, Any]:
        """Where it stands, as JSON; after ``withdraw``."""
        return {"generation": self.generation, "step": self.step, "expired": self._expiry.passed}

    def read(self, record: Mapping[str, Any]) -> None:
        """Stand where ``record`` says."""
        if "step" not in record:
            raise ConfigError("what is kept is not of tables that take steps together")
        self.generation, self.step = record["generation"], record["step"]
        self._expiry.passed = dict(record["expired"])


Applier = AtOnce | InStep
"""Takes what was judged new, in order: the same in the same order gives the same bits."""
