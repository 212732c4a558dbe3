"""A worker's batches for one step after another, read ahead in the background."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from shoal.lanes import Ledger, Order, Part, Span, Steps
from shoal.sources.source import Batch, Reader

_POLL_S = 0.05


@dataclass(frozen=True)
class LocalBatch:
    """One worker's samples of one step, in batches of at most ``micro_batch``; none if its lanes have none in it."""

    step: int
    epoch: int
    num_samples: int
    batches: list[Batch] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)


class Prefetch:
    """Iterates over the steps from ``first_step`` on; one step ahead is gathered, further ones are begun to be read.

    ``lanes``: this worker's. An error in the background is raised by ``next``. ``close`` ends the thread.
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
        depth: int = 2,
        read_ahead: int = 4,
    ) -> None:
        self._reader = reader
        self._order_of_epoch = order_of_epoch
        self._steps = steps
        self._lanes = lanes
        self._micro_batch = micro_batch
        self._read_ahead = read_ahead
        self._ready: queue.Queue[LocalBatch | Exception | None] = queue.Queue(depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first_step,), name="shoal-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        item = self._ready.get()
        if item is None:
            raise StopIteration
        if isinstance(item, Exception):
            raise item
        return item

    def _run(self, first_step: int) -> None:
        try:
            for step in range(first_step, self._steps.total_steps):
                self._announce(step + self._read_ahead)
                if not self._put(self._gather(step)):
                    return
            self._put(None)
        except Exception as error:  # noqa: BLE001 - it is raised where the batch is awaited
            self._put(error)

    def _put(self, item: LocalBatch | Exception | None) -> bool:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def _announce(self, step: int) -> None:
        if self._lanes and step < self._steps.total_steps:
            self._reader.expect(self._parts(self._steps.span(step)))

    def _parts(self, span: Span) -> list[Part]:
        order = self._order_of_epoch(span.epoch)
        return [p for lane in self._lanes for p in order.slice(lane, int(span.starts[lane]), int(span.stops[lane]))]

    def _gather(self, step: int) -> LocalBatch:
        span = self._steps.span(step)
        parts = self._parts(span) if self._lanes else []
        num_samples = sum(len(part.rows) for part in parts)
        if not num_samples:
            return LocalBatch(step, span.epoch, 0)
        groups = split(parts, self._micro_batch or num_samples)
        batches = [self._reader.gather(group) for group in groups]
        return LocalBatch(step, span.epoch, num_samples, batches, Ledger.expected(span, self._lanes))

    def close(self) -> None:
        self._closing.set()
        while True:  # a put that waits for room gets it
            try:
                self._ready.get_nowait()
            except queue.Empty:
                break
        self._thread.join()


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
