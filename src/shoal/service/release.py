"""A version that is loaded: its processes, kept in number, and the requests that wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from shoal.clock import Clock, SystemClock
from shoal.errors import ConfigError, Fault, ShoalError
from shoal.service import wire
from shoal.service.replica import Held, Loading, Replica
from shoal.serving.answering import Answer, Served
from shoal.serving.batching import Batcher, Batching, Lost
from shoal.serving.datatypes import Arrays

_log = logging.getLogger(__name__)

_RETRY_S = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Between attempts to replace a process; the last again and again."""
_DRAIN_S = 30.0
_LOOK_S = 0.02


class Witness(Protocol):
    """Who is told what happens."""

    def note(self, kind: str, **fields: Any) -> None:
        """An event."""
        ...

    def batch(self, num_samples: int, took_s: float) -> None:
        """A batch was computed."""
        ...


class Pool:
    """Where processes come from: one is always ready, and those of a version that is not needed any more are used
    again, since they have the code and much of the data already. ``num_replicas``: of a version."""

    def __init__(self, loading: Loading, num_replicas: int = 1) -> None:
        self.loading = loading
        self._most_spares = num_replicas + 1
        self._spares: list[Replica] = []
        self._coming: asyncio.Task[None] | None = None
        self._is_closed = False

    async def take(self, source: wire.Source) -> Replica:
        """One for this source, that is at nothing else: rather one that has held a version from the same place."""
        ended = [spare for spare in self._spares if spare.closed.done()]
        self._spares = [spare for spare in self._spares if spare not in ended]
        await asyncio.gather(*(spare.end(at_once=True) for spare in ended))
        if free := self._free():
            chosen = max(free, key=lambda spare: _nearness(spare, source))
            self._spares.remove(chosen)
        else:
            chosen = await Replica.begin(self.loading)
        if not (self._free() or self._is_closed or (self._coming is not None and not self._coming.done())):
            self._coming = asyncio.create_task(self._bring_up(source))
        return chosen

    def _free(self) -> list[Replica]:
        return [spare for spare in self._spares if not spare.is_busy]

    async def give_back(self, replica: Replica) -> None:
        """It is not needed any more."""
        if self._is_closed or replica.closed.done() or len(self._spares) >= self._most_spares:
            await replica.end()
        else:
            self._spares.append(replica)

    async def _bring_up(self, source: wire.Source) -> None:
        try:
            spare = await Replica.begin(self.loading)
        except Fault:  # the next who needs one is told why there is none
            return
        try:
            await spare.prepare(source)
        except (ShoalError, TimeoutError):  # or why it cannot be loaded
            await spare.end(at_once=True)
        except asyncio.CancelledError:
            await spare.end(at_once=True)
            raise
        else:
            await self.give_back(spare)

    async def close(self) -> None:
        """End those that are here."""
        self._is_closed = True
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)
        await asyncio.gather(*(spare.end() for spare in self._spares))
        self._spares = []


def _nearness(spare: Replica, source: wire.Source) -> tuple[bool, bool]:
    is_near = spare.source is not None and spare.source.path == source.path
    return is_near, is_near and spare.has_held


@dataclass
class Tally:
    """How a release did since it was set back: requests, those that failed, and how long they took (newest 2,000)."""

    num: int = 0
    num_failed: int = 0
    num_differing: int = 0
    reason: str = ""
    took_s: list[float] = field(default_factory=list)

    def answered(self, took_s: float) -> None:
        self.num += 1
        if len(self.took_s) >= 2_000:
            del self.took_s[:1_000]
        self.took_s.append(took_s)

    def failed(self, error: Exception) -> None:
        self.num += 1
        self.num_failed += 1
        self.reason = f"{type(error).__name__}: {error}"


class Release:
    """Made by ``open``. While it is open, a process that ends is replaced, and what it had is computed by another."""

    def __init__(self, source: wire.Source, pool: Pool, num_replicas: int, batcher: Batcher, witness: Witness) -> None:
        self.source = source
        self.batcher = batcher
        self.tally = Tally()
        self.held: Held
        self.figures: dict[str, Any] = {}
        """Metrics, once they were measured."""
        self.standard: dict[str, Any] = {}
        """Metrics that the next version is compared with, while this one is live."""
        self._pool = pool
        self._num_replicas = num_replicas
        self._witness = witness
        batcher.on_batch, batcher.on_failure = witness.batch, self._failed
        self._replicas: list[Replica] = []
        self._watching: list[asyncio.Task[None]] = []
        self._is_closed = False

    @classmethod
    async def open(
        cls, source: wire.Source, pool: Pool, num_replicas: int, batching: Batching, witness: Witness,
        clock: Clock | None = None,
    ) -> Release:  # fmt: skip
        """Load a source into so many processes. ``ShoalError``, with the reason, if that cannot be done: then none of
        them is left."""
        release = cls(source, pool, num_replicas, Batcher(batching, clock or SystemClock()), witness)
        try:
            release.held = await release._add()
            await asyncio.gather(*(release._add() for _ in range(num_replicas - 1)))
        except BaseException as error:
            await release.close()
            if isinstance(error, Lost):
                raise Fault("the model's process ended while it loaded; its output above says why") from error
            raise
        return release

    @property
    def served(self) -> Served:
        return self.held.served

    @property
    def version(self) -> int:
        return self.held.served.version

    @property
    def pids(self) -> list[int]:
        return [replica.pid for replica in self._replicas]

    async def _add(self) -> Held:
        replica = await self._pool.take(self.source)
        try:
            held = await replica.load(self.source)
        except BaseException:
            await replica.end(at_once=True)
            raise
        self._replicas.append(replica)
        self._watching.append(asyncio.create_task(self._watch(replica)))
        self.batcher.add(replica)
        return held

    async def _watch(self, replica: Replica) -> None:
        await asyncio.shield(replica.closed)
        if self._is_closed:
            return
        self.batcher.remove(replica)
        self._replicas.remove(replica)
        self._witness.note("replica_lost", version=self.version, pid=replica.pid)
        await replica.end(at_once=True)
        for attempt in range(1_000_000):
            try:
                await self._add()
            except Exception as error:  # noqa: BLE001 - whatever it is, requests wait for another
                if not isinstance(error, ShoalError | OSError):
                    _log.exception("a process of version %d was not replaced, for a fault in the service", self.version)
                self._witness.note("replica_failed", version=self.version, reason=str(error) or type(error).__name__)
                await asyncio.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            else:
                self._witness.note("replica_replaced", version=self.version, pid=self._replicas[-1].pid)
                return

    def ask(
        self, inputs: Arrays, timeout_s: float, answered: Callable[[Arrays], object] | None = None
    ) -> asyncio.Future[Answer]:
        """As ``Batcher.ask``. ``answered`` is given the inputs once they are. Its tally is of that, and of requests
        that it fails on but for what whoever asks has to mend."""
        return self.batcher.ask_for(inputs, timeout_s, partial(self._made, inputs, time.perf_counter(), answered))

    def _made(
        self, inputs: Arrays, begun_s: float, answered: Callable[[Arrays], object] | None, outputs: Arrays
    ) -> Answer:
        self.tally.answered(time.perf_counter() - begun_s)
        if answered is not None:
            answered(inputs)
        return Answer(self.version, outputs)

    def _failed(self, error: Exception) -> None:
        if not isinstance(error, ConfigError):
            self.tally.failed(error)

    async def measure(self) -> dict[str, Any]:
        """Metrics on the job's test data, computed by one of its processes, which answers nobody meanwhile; none if
        there is no such data. ``Fault`` if that fails. Cancelled, that process is ended, and replaced."""
        if not self._replicas:
            raise Fault("no process of the model is there to measure it")
        replica = self._replicas[0]
        try:
            return await replica.measure()
        except Lost:
            raise Fault("the model's process ended while it was measured") from None
        except asyncio.CancelledError:
            self.batcher.remove(replica)
            replica.kill()
            raise

    async def whole(self, within_s: float) -> None:
        """Once all its processes are there, or some are after that time. ``Fault`` if none is, or it was closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self.batcher.num_runners < self._num_replicas and not self._is_closed:
                    await asyncio.sleep(_LOOK_S)
        if self._is_closed or not self.batcher.num_runners:
            raise Fault(f"no process of version {self.version} is there to answer")

    async def close(self) -> None:
        """Finish what waits and is computed, for at most 30 s; its processes go back to where they came from."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await self.batcher.drain()
        self._is_closed = True
        self.batcher.close()
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        replicas, self._replicas = self._replicas, []
        for replica in replicas:
            self.batcher.remove(replica)
        await asyncio.gather(*(self._pool.give_back(replica) for replica in replicas))
