"""A worker's batches for one step after another, read ahead in the background."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.lanes import Ledger, Order, Part, Span, Steps
from shoal.lanes.hashing import Indices
from shoal.lanes.ledger import sample_hashes
from shoal.sources.ahead import EVERY_STEPS, ReadAhead
from shoal.sources.columns import Columns, take
from shoal.sources.source import Batch, Reader

_DEPTH = 2
_TOGETHER_BYTES = 8 << 20


@dataclass(frozen=True)
class LocalBatch:
    """One worker's samples of one step, in batches of at most ``micro_batch``; none if its lanes have none in it."""

    step: int
    epoch: int
    num_samples: int
    batches: list[Batch] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)


class Prefetch:
    """Iterates over the steps from ``first_step`` to the last, for the lanes of one worker.

    Two steps wait ready while the next is gathered, or the next eight if they come to 8 MiB at most. What is raised in
    the background is raised by ``next``. ``close`` ends the thread, which may have to finish the read that it is in;
    the reader stays open.
    """

    def __init__(
        self,
        reader: Reader,
        order_of_epoch: Callable[[int], Order],
        steps: Steps,
        lanes: tuple[int, ...],
        *,
        first_step: int,
        micro_batch: int | None = None,
    ) -> None:
        self._reader = reader
        self._order_of_epoch = order_of_epoch
        self._steps = steps
        self._lanes = np.asarray(lanes, np.int64)
        self._micro_batch = micro_batch
        self._num_together = 1
        self._changed = threading.Condition()
        self._ready: deque[LocalBatch] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(first_step,), name="shoal-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        raise self._error or StopIteration

    def peek(self) -> LocalBatch | None:
        """What ``next`` will give, if it waits ready."""
        with self._changed:
            return self._ready[0] if self._ready else None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self, first_step: int) -> None:
        try:
            self._take_steps(first_step)
        except BaseException as error:  # noqa: BLE001 - it is raised where the batch is awaited
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take_steps(self, first_step: int) -> None:
        ahead = ReadAhead(self._reader, self._order_of_epoch, self._steps, self._lanes)
        try:
            step = first_step
            while step < self._steps.total_steps:
                ahead.move_to(step)
                found = self._gather(step, self._end_of_run(step))
                if not self._put(found):
                    return
                step += len(found)
        finally:
            ahead.end()

    def _end_of_run(self, step: int) -> int:
        """Steps up to here are gathered together: all of one epoch, and small."""
        epoch, _ = self._steps.locate(step)
        last = min((epoch + 1) * self._steps.steps_per_epoch, self._steps.total_steps)
        return min(step + self._num_together, last)

    def _put(self, found: list[LocalBatch]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < _DEPTH or self._closed)
            if not self._closed:
                self._ready.extend(found)
                self._changed.notify_all()
            return not self._closed

    def _gather(self, step: int, stop: int) -> list[LocalBatch]:
        """The steps from ``step`` up to ``stop``. A lane's share of one may be a few rows, which cost as much to look
        up as many: they are gathered together, and then copied apart."""
        spans = [self._steps.span(each) for each in range(step, stop)]
        first, last = spans[0].starts, spans[-1].stops
        rows = apart(spans, self._lanes)
        hashes = sample_hashes(spans[0].epoch, self._lanes, first[self._lanes], last[self._lanes])
        batches = self._batches(self._parts(spans[0].epoch, first, last), rows)
        self._num_together = _how_many_together(batches[0])
        return [
            LocalBatch(step + index, spans[0].epoch, len(some), batches[index], Ledger.of_hashes(hashes[some]))
            for index, some in enumerate(rows)
        ]

    def _parts(self, epoch: int, starts: Indices, stops: Indices) -> list[Part]:
        order, begins, ends = self._order_of_epoch(epoch), starts.tolist(), stops.tolist()
        return [part for lane in self._lanes.tolist() for part in order.slice(lane, begins[lane], ends[lane])]

    def _batches(self, parts: Sequence[Part], rows: Sequence[Indices]) -> list[list[Batch]]:
        """For each step its micro-batches, of the ``rows`` that it has among those of all parts."""
        if not parts:
            return [[] for _ in rows]
        most = self._micro_batch or self._steps.global_batch
        if len(rows) == 1:
            return [[self._reader.gather(group) for group in split(parts, most)]]
        together = [Columns.of(self._reader.gather(parts))]
        return [[take(together, [some[i : i + most]]) for i in range(0, len(some), most)] for some in rows]


def _how_many_together(batches: Sequence[Batch]) -> int:
    """As many steps as are small together, going by one of them."""
    num_bytes = sum(Columns.of(batch).num_bytes for batch in batches)
    return max(1, min(EVERY_STEPS, _TOGETHER_BYTES // max(1, num_bytes)))


def apart(spans: Sequence[Span], lanes: Indices) -> list[Indices]:
    """Which rows each span has among those of all spans, gathered lane by lane. The spans follow one another."""
    first, last = spans[0].starts[lanes], spans[-1].stops[lanes]
    begins = np.cumsum(last - first) - last
    found = []
    for span in spans:
        starts, counts = span.starts[lanes], (span.stops - span.starts)[lanes]
        before = np.cumsum(counts) - counts
        found.append(np.arange(counts.sum()) + np.repeat(begins + starts - before, counts))
    return found


def split(parts: Sequence[Part], most: int) -> list[list[Part]]:
    """Parts in groups of at most ``most`` rows, in order."""
    groups: list[list[Part]] = [[]]
    room = most
    for part in parts:
        rows = part.rows
        while len(rows):
            if room == 0:
                groups.append([])
                room = most
            groups[-1].append(Part(part.block, rows[:room]))
            taken = min(room, len(rows))
            rows, room = rows[taken:], room - taken
    return groups
