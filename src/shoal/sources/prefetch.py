"""A worker's batches for one step after another, read ahead in the background."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from shoal.lanes import Ledger, Order, Part, Steps
from shoal.sources.ahead import ReadAhead
from shoal.sources.source import Batch, Reader

_DEPTH = 2


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

    Two steps wait ready while a third is gathered. What is raised in the background is raised by ``next``. ``close``
    ends the thread, which may have to finish the read that it is in; the reader stays open.
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
        self._lanes = lanes
        self._micro_batch = micro_batch
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
            for step in range(first_step, self._steps.total_steps):
                ahead.move_to(step)
                if not self._put(self._gather(step)):
                    return
        finally:
            ahead.end()

    def _put(self, batch: LocalBatch) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < _DEPTH or self._closed)
            if not self._closed:
                self._ready.append(batch)
                self._changed.notify_all()
            return not self._closed

    def _gather(self, step: int) -> LocalBatch:
        span = self._steps.span(step)
        order = self._order_of_epoch(span.epoch)
        starts, stops = span.starts.tolist(), span.stops.tolist()
        parts = [part for lane in self._lanes for part in order.slice(lane, starts[lane], stops[lane])]
        if not parts:
            return LocalBatch(step, span.epoch, 0)
        ledger = Ledger.expected(span, self._lanes)
        groups = split(parts, self._micro_batch) if self._micro_batch else [parts]
        return LocalBatch(step, span.epoch, ledger.count, [self._reader.gather(group) for group in groups], ledger)


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
