"""A sparse table in memory: from int64 ids to rows, with their optimizer's slots beside them."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import Bug, ConfigError, Diverged
from shoal.tables import kernels
from shoal.tables.batches import buckets_of
from shoal.tables.image import EVERYTHING, Ids, Image
from shoal.tables.kernels import EMPTY, GRAVES, LIVE, MARK, MARKED, MOVED, NEXT, REFUSED, WAITING
from shoal.tables.memory import release, zeros
from shoal.tables.spec import TableSpec

Weights = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_FULLEST, _FRESH = 0.85, 0.68
_GROWTH = 1.25
_SOON = 0.05
"""With so much of the index still free the next one begins to take its memory."""
_LEAST_PLACES, _MOST_PLACES, _MOST_ROWS = 1024, (1 << 32) - 1, (1 << 31) - 2
_MOVED_A_PUSH, _MOVED_AN_ID = 4096, 8
_MOST_GRAVES = 0.25
_MOST_REMOVED = 1 << 20
_LAST_CLOCK = (1 << 32) - 1
_MOST_NOTED = 1 << 20
_WORD_BYTES = 4
_PLACE = np.dtype([("id", np.int64), ("ref", np.int32), ("touched", np.uint32)])
_PAGE_PLACES = mmap.PAGESIZE // _PLACE.itemsize


@dataclass(frozen=True)
class Stats:
    """What a table is about. ``num_waiting``: ids that were pushed too seldom for a row; ``num_refused``: how often an
    id would have got one and the memory budget did not allow it; ``num_asked`` and ``num_found``: ids pulled, and those
    that had a row."""

    num_rows: int
    num_waiting: int
    num_refused: int
    num_asked: int
    num_found: int
    num_bytes: int
    clock: int


class Table:
    """``pull`` and ``push`` by id; one thread at a time. ``clock`` counts the operations that have changed it.

    Rows take the ``memory_bytes`` that they are given, by default half of this machine's, as they are used; ids beyond
    that get none (``Stats.num_refused``). The same operations in the same order give the same bits on every machine. An
    id takes 19 to 24 bytes besides its row, and up to 42 while the index grows, which is spread over pushes: one moves
    4096 places and 8 an id at most.
    """

    def __init__(self, spec: TableSpec, memory_bytes: int | None = None) -> None:
        if memory_bytes is None:
            memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        num_rows = min(memory_bytes // (_WORD_BYTES * spec.num_words), _MOST_ROWS)
        if num_rows < 1:
            raise ConfigError(
                f"table {spec.name}: a row takes {_WORD_BYTES * spec.num_words} bytes, and the budget is {memory_bytes}"
            )
        self.spec = spec
        self._rows = zeros((num_rows, spec.num_words), np.float32, in_order=True)
        rule = spec.rule
        self._form = (
            rule.code, spec.num_weight_words, spec.dtype == "bfloat16", np.array(rule.numbers, np.float32),
            np.float32(rule.slot_start), np.uint64(spec.key), np.float32(spec.initial_scale),
        )  # fmt: skip
        self.clear()

    def clear(self) -> None:
        """Forget all of it."""
        self.clock = 0
        self._state = np.zeros(10, np.int64)
        self._noted = zeros((min(_MOST_NOTED, len(self._rows)),), np.int64)
        self._new = self._places(_LEAST_PLACES)
        self._old = self._places(0)
        self._next = self._places(0)
        self._removed: list[tuple[int, Ids]] = []
        self._deltas_from = 0
        self._num_asked = self._num_found = 0

    def _places(self, num: int, *, in_order: bool = False) -> tuple[Any, ...]:
        seen_at = num if self.spec.expire_after_s is not None else 0
        places = zeros((num,), _PLACE, in_order=in_order)
        return places["id"], places["ref"], places["touched"], zeros((seen_at,), np.int64)

    # By id

    def pull(self, ids: npt.ArrayLike) -> Weights:
        """(n,) ids -> (n, dim) float32. An id without a row has its initial values. Changes nothing."""
        keys = self.check_ids(ids)
        out = np.empty((len(keys), self.spec.dim), np.float32)
        found = kernels.pull(keys, (self._new[:2], self._old[:2]), self._rows, self._form, out)
        self._num_asked += len(keys)
        self._num_found += found
        return out

    def push(self, ids: npt.ArrayLike, gradients: npt.ArrayLike, now_s: int = 0) -> None:
        """(n,) ids take (n, dim) gradients, in order; an id that is there twice takes both, one after the other.
        ``now_s``: the event time. ``ConfigError`` or ``Diverged`` before anything is changed."""
        keys, values = self.check_ids(ids), self.check_gradients(ids, gradients)
        self._tick()
        self._make_room(len(keys))
        moment = (self.clock, now_s, self.spec.admit_after)
        kept = (self._rows, self._state, self._noted)
        kernels.push(keys, values, (self._new, self._old), kept, self._form, moment)
        if len(self._old[0]):
            self._move(_MOVED_A_PUSH + _MOVED_AN_ID * len(keys))
        else:
            self._prepare(len(keys))

    def expire(self, now_s: int) -> Ids:
        """Remove the ids that were not pushed within ``expire_after_s`` before ``now_s``: which."""
        if self.spec.expire_after_s is None:
            raise ConfigError(f"table {self.spec.name} was made without expire_after_s: nothing in it expires")
        self._tick()
        self._settle()
        found = np.empty(self._num_ids, np.int64)
        count = kernels.sweep(self._new, self._rows, now_s - self.spec.expire_after_s, found, self._state)
        removed = found[:count].copy()
        if count:
            self._removed.append((self.clock, removed))
        while len(self._removed) > 1 and sum(len(ids) for _, ids in self._removed) > _MOST_REMOVED:
            self._deltas_from = max(self._deltas_from, self._removed.pop(0)[0])
        if self._state[GRAVES] > _MOST_GRAVES * self._num_ids:
            self._grow(0)
        return removed

    def expiring(self, now_s: int) -> Ids:
        """Which ids ``expire`` would remove."""
        self._settle()
        own, refs, _, seen_at = self._new
        lapsed = seen_at < now_s - (self.spec.expire_after_s or 0)
        chosen: Ids = own[lapsed & (refs != 0) & (refs != kernels.GRAVE)] if len(seen_at) else own[:0]
        return chosen.copy()

    def check_ids(self, ids: npt.ArrayLike) -> Ids:
        """Ids as (n,) int64. ``ConfigError`` for what they cannot be read from without loss."""
        keys = np.asarray(ids)
        if keys.dtype == np.int64 and keys.ndim == 1 and keys.flags.c_contiguous:
            return keys
        is_fit = keys.dtype.kind in "iu" and np.can_cast(keys.dtype, np.int64, "safe")
        if keys.ndim != 1 or not (is_fit or len(keys) == 0):
            came = f"{keys.dtype} of shape {keys.shape}"
            raise ConfigError(f"table {self.spec.name}: ids must be a vector of int64, not {came}")
        return np.ascontiguousarray(keys, np.int64)

    def check_gradients(self, ids: npt.ArrayLike, gradients: npt.ArrayLike) -> Weights:
        """Gradients as (n, dim) float32. ``ConfigError`` for another shape, ``Diverged`` for what is not finite."""
        values = np.asarray(gradients)
        wanted = (len(np.asarray(ids)), self.spec.dim)
        if values.shape != wanted or values.dtype.kind != "f":
            came = f"{values.dtype} of shape {values.shape}"
            raise ConfigError(f"table {self.spec.name}: gradients must be float32 of shape {wanted}, not {came}")
        values = np.ascontiguousarray(values, np.float32)
        if (bad := kernels.all_finite(values)) >= 0:
            which = int(np.asarray(ids)[bad])
            raise Diverged(f"table {self.spec.name}: the gradient of id {which} is not finite; nothing was changed")
        return values

    # Growth

    @property
    def _num_ids(self) -> int:
        return int(self._state[LIVE] + self._state[WAITING])

    def _tick(self) -> None:
        if self.clock == _LAST_CLOCK:
            raise Bug(f"table {self.spec.name} has had {_LAST_CLOCK} operations, and counts no further")
        self.clock += 1

    def _make_room(self, num: int) -> None:
        if self._num_ids + int(self._state[GRAVES]) + num > _FULLEST * len(self._new[0]):
            self._settle()
            self._grow(num)

    def _prepare(self, num: int) -> None:
        """Have the next index take its memory bit by bit, before it is needed: ids are all over it from the first push
        on, and the kernel takes its time for each page."""
        capacity = len(self._new[0])
        soon, left = _SOON * capacity, _FULLEST * capacity - self._num_ids
        if left > soon or self._state[GRAVES]:
            return
        if not len(self._next[0]):
            with suppress(ConfigError):  # this push has been taken; one that needs the memory will be refused
                self._next = self._places(self._capacity(int(_FULLEST * capacity) + 2 * num), in_order=True)
        before, until = (min(1.0, max(0.0, 1 - ids / soon)) for ids in (left + num, left))
        for array in (self._next[0], self._next[3]):
            array[int(before * len(array)) : int(until * len(array)) : _PAGE_PLACES] = 0

    @staticmethod
    def _capacity(num_ids: int) -> int:
        return max(_LEAST_PLACES, int(num_ids / _FRESH))

    def _grow(self, num: int) -> None:
        least = self._capacity(self._num_ids + num)
        capacity = least if self._state[GRAVES] else max(least, int(_GROWTH * len(self._new[0])))
        if capacity > _MOST_PLACES:
            raise ConfigError(f"table {self.spec.name}: {self._num_ids + num} ids are too many for one shard")
        is_prepared = len(self._next[0]) >= capacity and not self._state[GRAVES]
        self._old, self._new = self._new, self._next if is_prepared else self._places(capacity)
        self._next = self._places(0)
        self._state[[GRAVES, MOVED, EMPTY]] = 0

    def _move(self, count: int) -> None:
        kernels.move(self._old, self._new, count, self._state)
        if self._state[MOVED] == len(self._old[0]):
            self._old = self._places(0)
        else:  # what is before an empty place is looked for no more
            release(self._old[0], int(self._state[EMPTY]))

    def _settle(self) -> None:
        if len(self._old[0]):
            self._move(len(self._old[0]))

    # Images

    def image(self, since: int = EVERYTHING) -> Image:
        """A copy of all that it holds, or of what has changed after operation ``since``. ``ConfigError`` where removals
        since then have been forgotten: a full image is needed then."""
        if since != EVERYTHING and not self._deltas_from <= since <= self.clock:
            raise ConfigError(
                f"table {self.spec.name} at operation {self.clock} knows what has changed since any from "
                f"{self._deltas_from} on, not since {since}; take a full image"
            )
        self._settle()
        places = self._touched_after(since)
        removed = [ids for clock, ids in self._removed if clock > since] if since != EVERYTHING else []
        together = np.unique(np.concatenate(removed)) if removed else np.empty(0, np.int64)
        return replace(self._image_at(places, together), since=since)

    def image_of(self, ids: Ids) -> Image:
        """What it holds of these distinct ids, for ``set_to``: those that it does not know are ``removed``."""
        self._settle()
        places = np.empty(len(ids), np.int64)
        kernels.locate(ids, self._new, places)
        return self._image_at(places[places >= 0], ids[places < 0])

    def image_in(self, buckets: Mask, since: int) -> Image:
        """What it holds of the ids of some buckets (4096,), as far as they were touched after operation ``since``, and
        which have expired since. One pass over the index, whatever the buckets. ``ConfigError`` where what expired
        since then has been forgotten."""
        if EVERYTHING != since < self._deltas_from:
            raise ConfigError(f"table {self.spec.name} has forgotten what expired after operation {since}; begin anew")
        self._settle()
        lapsed = [ids for clock, ids in self._removed if clock > since] if since != EVERYTHING else []
        removed = np.unique(np.concatenate(lapsed)) if lapsed else np.empty(0, np.int64)
        removed = removed[buckets[buckets_of(removed)]]
        places = np.empty(len(removed), np.int64)
        kernels.locate(removed, self._new, places)
        return self._image_at(self._places_in(buckets, since), removed[places < 0])

    def drop(self, buckets: Mask) -> None:
        """Forget the ids of some buckets: another table has them."""
        kernels.bury_all(self._places_in(buckets, EVERYTHING), self._new, self._rows, self._state)
        if self._state[GRAVES] > _MOST_GRAVES * max(self._num_ids, _LEAST_PLACES):
            self._grow(0)

    def _places_in(self, buckets: Mask, since: int) -> Ids:
        self._settle()
        found = np.empty(self._num_ids, np.int64)
        return found[: kernels.chosen_in(self._new, since, buckets, found)]

    def _image_at(self, places: Ids, removed: Ids) -> Image:
        own, refs, touched, seen_at = self._new
        chosen = refs[places]
        return Image(
            spec=self.spec, since=EVERYTHING, clock=self.clock, ids=own[places],
            counts=np.minimum(chosen, 1), touched=touched[places],
            seen_at=seen_at[places] if len(seen_at) else seen_at.copy(),
            rows=self._rows[chosen[chosen > 0] - 1], removed=removed,
        )  # fmt: skip

    def set_to(self, image: Image) -> None:
        """Have the ids of an image as it says, and be at its operation. Of a table as it was: back to that, if none but
        these ids has been pushed since. ``ConfigError`` if there is no room, with some of the ids set."""
        self._settle()
        kernels.take_away(image.removed, self._new, self._rows, self._state)
        again = image.ids[image.counts < 0]  # of those that have got a row since
        kernels.take_away(again, self._new, self._rows, self._state)
        self._make_room(len(image.ids))
        self._settle()
        values = (image.counts, image.touched, image.seen_at)
        if kernels.put(image.ids, values, image.rows, self._new, self._rows, self._state) < len(image.rows):
            raise self._too_many(image)
        self.clock = image.clock
        self._removed = [(clock, ids) for clock, ids in self._removed if clock <= image.clock]
        if self._state[MARKED] >= 0:
            self._note_anew(np.concatenate([self._noted[: self._state[MARKED]], image.ids]))

    def _touched_after(self, since: int) -> Ids:
        """The places of ids that were, in no order."""
        num_noted = int(self._state[MARKED])
        if since == EVERYTHING or num_noted < 0:
            found = np.empty(self._num_ids, np.int64)
            return found[: kernels.chosen(self._new, since, found)]
        found = np.empty(num_noted, np.int64)
        return np.unique(found[: kernels.noted_places(self._noted[:num_noted], self._new, since, found)])

    def forget(self, until: int) -> None:
        """Deltas will be asked for since operation ``until`` or later only: those are quick then, unless they hold more
        than a million ids."""
        self._removed = [(clock, ids) for clock, ids in self._removed if clock > until]
        self._deltas_from = max(self._deltas_from, until)
        self._settle()
        touched = self._new[0][self._touched_after(self._deltas_from)]
        self._note_anew(touched)

    def _note_anew(self, touched: Ids) -> None:
        """These ids are what was touched since the moment that deltas are from."""
        fits = len(touched) <= len(self._noted)
        self._state[MARK], self._state[MARKED] = self._deltas_from, len(touched) if fits else -1
        if fits:
            self._noted[: len(touched)] = touched

    def apply(self, image: Image) -> None:
        """Take a delta on top of what it holds, or a full image in its place. ``ConfigError`` for one that does not
        fit, before anything is changed, and for more rows than the memory budget allows: after such a delta the table
        is to be given a full image."""
        if image.since == EVERYTHING:
            if image.spec != self.spec:
                raise ConfigError(f"an image of {image.spec} is not one of {self.spec}")
            if len(image.rows) > len(self._rows):
                raise self._too_many(image)
            self.clear()
            self._deltas_from = image.clock
        else:
            image.check_follows(self.spec, self.clock)
        self._settle()
        kernels.take_away(image.removed, self._new, self._rows, self._state)
        self._make_room(len(image.ids))
        self._settle()
        values = (image.counts, image.touched, image.seen_at)
        count = kernels.put(image.ids, values, image.rows, self._new, self._rows, self._state)
        if count < len(image.rows):
            raise self._too_many(image)
        if len(image.removed):
            self._removed.append((image.clock, image.removed))
        self.clock = image.clock
        if image.since == EVERYTHING:
            self._note_anew(image.ids[:0])
        elif self._state[MARKED] >= 0:
            self._note_anew(np.concatenate([self._noted[: self._state[MARKED]], image.ids]))

    def _too_many(self, image: Image) -> ConfigError:
        return ConfigError(
            f"table {self.spec.name}: the {len(image.rows)} rows of an image do not fit beside what is there into the "
            f"memory budget, which is {len(self._rows)} rows; give it more memory"
        )

    @property
    def stats(self) -> Stats:
        """What it is about, now."""
        places = sum(array.nbytes for array in (*self._new, *self._old, *self._next))
        num_bytes = places + int(self._state[NEXT]) * self.spec.num_words * _WORD_BYTES
        return Stats(
            int(self._state[LIVE]), int(self._state[WAITING]), int(self._state[REFUSED]),
            self._num_asked, self._num_found, num_bytes, self.clock,
        )  # fmt: skip
