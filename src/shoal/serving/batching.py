"""Requests that wait for the model, and go through it together: adaptive batches from a bounded queue.

A model that is idle takes what comes at once, so nobody waits for company. While it computes, requests gather; then it
takes as many as fit. What is beyond the queue's bounds is refused before it costs anything, so a server that is offered
twice what it can do still does all that it can. Who has given up is dropped before a computation, too.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np

from shoal.clock import Clock, SystemClock
from shoal.errors import ConfigError, Fault
from shoal.serving.datatypes import Arrays, Tensors
from shoal.serving.pace import Pace, round_size
from shoal.serving.predictor import computed

T = TypeVar("T")

_HOPE = 0.8
"""Of its time, within which a request must be thought to be computed: the thought may be wrong."""
_TOO_LATE = "the model did not come to this request in its time"
_MOST_LOST = 3
"""So many runners may be lost with a request before it is held to be what ends them."""


class Overloaded(Fault):
    """The queue is full. ``retry_after_s``: when there will be room, going by how fast it moves."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[Overloaded], tuple[str, float]]:
        return type(self), (self.message, self.retry_after_s)


class Expired(Fault):
    """The request's time was over before the model came to it."""


class Lost(Fault):
    """The process that computed a batch has ended, and nobody knows of which request."""


class Done(NamedTuple):
    """All outputs of a batch. ``took_s``: to compute it; None: as long as it was waited for."""

    outputs: Arrays
    took_s: float | None = None


class Runner(Protocol):
    """What computes batches, one at a time."""

    @property
    def depth(self) -> int:
        """How many it may have at once, of which it computes the oldest. More than one only if it tells how long each
        took."""
        ...

    def start(self, inputs: Arrays) -> asyncio.Future[Done]:
        """Begin, at once, with all outputs from all inputs. The future fails with ``Lost`` if this runner can do no
        more; whatever else it fails with is of this batch."""
        ...


@dataclass(frozen=True, eq=False)
class Threaded:
    """A model that runs in another thread."""

    predict: Callable[[Tensors], Tensors]
    executor: Executor
    depth: ClassVar[int] = 1

    def start(self, inputs: Arrays) -> asyncio.Future[Done]:
        return asyncio.get_running_loop().run_in_executor(self.executor, self._compute, inputs)

    def _compute(self, inputs: Arrays) -> Done:
        return Done(computed(self.predict, inputs))


@dataclass(frozen=True, kw_only=True)
class Batching:
    """``max_samples``: that are computed at once, and no more than take ``max_batch_s``, nor than gain by it. The queue
    holds at most ``max_requests`` and ``max_bytes`` of tensors, and no more than will be computed within
    ``max_wait_s``, and within the time of each, going by how long batches took; or a single request.
    """

    max_samples: int = 64
    max_batch_s: float = 0.05
    max_requests: int = 512
    max_bytes: int = 256 * 2**20
    max_wait_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_samples", "max_requests", "max_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_batch_s", "max_wait_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")


@dataclass(eq=False, slots=True)
class _Waiting:
    inputs: Arrays
    num_samples: int
    num_bytes: int
    kind: Sequence[tuple[str, tuple[int, ...]]]
    """Names and shapes beyond the samples: what may go together."""
    deadline_s: float
    answer: asyncio.Future[Any]
    make: Callable[[Arrays], Any]
    is_alone: bool = False
    """It was in a batch that failed, so that it goes by itself."""
    num_lost: int = 0
    """How many runners were lost with it."""


class Batcher:
    """Within one event loop; each of its runners computes one batch at a time, and has the next one already where
    enough wait for it, so that it need not wait for this loop to come to it. Where a batch fails, each of its
    requests is computed by itself, so that one that the model cannot bear fails alone. Those of a runner that was lost
    are computed by another, in turn: one that loses three runners is what loses them, and fails."""

    def __init__(self, batching: Batching | None = None, clock: Clock | None = None) -> None:
        self._batching = batching or Batching()
        self._clock = clock or SystemClock()
        self._queue: deque[_Waiting] = deque()
        self._num_bytes = self._num_samples = 0
        self._pace = Pace()
        self._size = self._batching.max_samples
        """Of a batch, as large as it may be; and how long it takes."""
        self._size_s = 0.0
        self._idle: deque[Runner] = deque()
        self._at_work: dict[Runner, list[asyncio.Future[Done]]] = {}
        self._num_under_way = 0
        self._gone: set[Runner] = set()
        """To get no more, of those at work."""
        self._lost: set[Runner] = set()
        """Of which a batch was lost, and others still are to be."""
        self._is_closed = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = math.inf
        """When it goes off: no later than the time of any who waits is over."""
        self.on_batch: Callable[[int, float], None] | None = None
        """Told of each batch that was computed."""
        self.on_failure: Callable[[Exception], None] | None = None
        """Told of each request that was not refused, and cannot be answered."""

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_runners(self) -> int:
        return len(self._idle) + len(self._at_work) - len(self._gone)

    def add(self, runner: Runner) -> None:
        """Let it have work, beginning with what waits."""
        self._idle.append(runner)
        self._dispatch()

    def remove(self, runner: Runner) -> None:
        """Give it no more work; what it computes is still awaited."""
        if runner in self._idle:
            self._idle.remove(runner)
        elif runner in self._at_work:
            self._gone.add(runner)

    async def drain(self) -> None:
        """Until nothing is computed any more, nor waits for somebody who is there."""
        while self._at_work:
            await asyncio.wait([future for futures in self._at_work.values() for future in futures])
            await asyncio.sleep(0)

    def close(self) -> None:
        """Take no more, and refuse what waits."""
        self._is_closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = math.inf  # what is lost from now on waits no longer than its time, either
        while self._queue:
            _fail(self._leave(), Overloaded("the server is ending: ask again, and another will answer"))

    def check_room(self, num_bytes: int = 0, timeout_s: float = math.inf) -> None:
        """``Overloaded`` if a request of so many bytes, which has so long, would not be taken. Cheap: ask before one is
        read."""
        bounds = self._batching
        if self._is_closed:
            raise Overloaded("the server is ending: ask again, and another will answer")
        if not self._queue:
            return
        if len(self._queue) >= bounds.max_requests:
            self._forget_those_who_left()
        num, wait_s = len(self._queue), self._wait_s()
        too_many = num >= bounds.max_requests or self._num_bytes + num_bytes > bounds.max_bytes
        most_s = min(bounds.max_wait_s, _HOPE * timeout_s)
        if num and (too_many or wait_s > most_s):
            raise Overloaded(
                f"{num} requests wait, with {self._num_bytes} bytes, for about {wait_s:.3f} s; there is room for "
                f"{bounds.max_requests}, {bounds.max_bytes} and {most_s:g}: try again later",
                max(1e-3, wait_s),
            )

    def _wait_s(self) -> float:
        """Until one more would have been computed, about."""
        pace, size = self._pace, self._size
        num_batches, num_runners = -(-(self._num_samples + 1) // size), max(1, self.num_runners)
        ahead_s = pace.batch_s * num_batches + pace.sample_s * (self._num_samples + 1)
        return (ahead_s + self._size_s * (self._num_under_way - len(self._at_work) / 2)) / num_runners

    def ask(self, inputs: Arrays, timeout_s: float) -> asyncio.Future[Arrays]:
        """All outputs for these inputs, whose first axis counts samples. It fails with ``Overloaded`` if the queue is
        full, ``Expired`` if the model does not come to it in time, ``Fault`` if it ends the model's process time and
        again, else with whatever the runner raises. Cancelled, it is not computed any more."""
        return self.ask_for(inputs, timeout_s, _as_they_are)

    def ask_for(self, inputs: Arrays, timeout_s: float, make: Callable[[Arrays], T]) -> asyncio.Future[T]:
        """What is made of all outputs for these inputs, as soon as they are there; else as ``ask``."""
        waiting = self._waiting(inputs, timeout_s, make)
        try:
            self.check_room(waiting.num_bytes, timeout_s)
        except Overloaded as error:
            waiting.answer.set_exception(error)
            return waiting.answer
        self._queue.append(waiting)
        self._count(waiting, 1)
        self._dispatch()
        if self._queue:
            self._set_alarm(waiting.deadline_s)
        return waiting.answer

    def _waiting(self, inputs: Arrays, timeout_s: float, make: Callable[[Arrays], Any]) -> _Waiting:
        kind, num_samples, num_bytes = [], 0, 0
        for name, array in inputs.items():
            shape = array.shape
            kind.append((name, shape[1:]))
            num_samples, num_bytes = shape[0], num_bytes + array.nbytes
        answer = asyncio.get_running_loop().create_future()
        return _Waiting(inputs, num_samples, num_bytes, kind, self._clock.monotonic_s() + timeout_s, answer, make)

    def _set_alarm(self, deadline_s: float) -> None:
        """To tell whoever still waits then that his time is over."""
        if deadline_s >= self._alarm_s:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_s = deadline_s
        left_s = max(0.0, deadline_s - self._clock.monotonic_s())
        self._alarm = asyncio.get_running_loop().call_later(left_s, self._expire)

    def _expire(self) -> None:
        due_s, self._alarm, self._alarm_s = self._alarm_s, None, math.inf
        self._forget_those_who_left()
        for waiting in self._queue:
            if waiting.deadline_s <= due_s:
                _fail(waiting, Expired(_TOO_LATE))
        self._forget_those_who_left()
        if self._queue:
            self._set_alarm(min(waiting.deadline_s for waiting in self._queue))

    def _forget_those_who_left(self) -> None:
        queue, self._queue = self._queue, deque()
        for waiting in queue:
            if waiting.answer.done():
                self._count(waiting, -1)
            else:
                self._queue.append(waiting)

    def _count(self, waiting: _Waiting, sign: int) -> None:
        self._num_bytes += sign * waiting.num_bytes
        self._num_samples += sign * waiting.num_samples

    def _leave(self) -> _Waiting:
        waiting = self._queue.popleft()
        self._count(waiting, -1)
        return waiting

    def _dispatch(self) -> None:
        while self._idle and (batch := self._next(0.0)):
            self._start(self._idle.popleft(), batch)
        if self._num_samples < self._size or not self._queue:
            return
        for runner in [one for one in self._at_work if self._takes_ahead(one)]:
            if batch := self._next(self._pace.takes_s(self._size)):
                self._start(runner, batch)

    def _takes_ahead(self, runner: Runner) -> bool:
        """Whether it may have another batch behind the one that it computes."""
        return len(self._at_work[runner]) < runner.depth and runner not in self._gone and not self._queue[0].is_alone

    def _start(self, runner: Runner, batch: Sequence[_Waiting]) -> None:
        begun_s, future = self._clock.monotonic_s(), runner.start(_together([waiting.inputs for waiting in batch]))
        self._at_work.setdefault(runner, []).append(future)
        self._num_under_way += 1
        future.add_done_callback(partial(self._finished, runner, batch, begun_s))

    def _next(self, delay_s: float) -> list[_Waiting]:
        """The oldest, and as many more of its kind as fit, also into its time; others keep their place. Who has given
        up, or could not be answered in time, is left out. ``delay_s``: until they are begun with; who has no time for
        that stays, for somebody may be there sooner."""
        batch: list[_Waiting] = []
        others: list[_Waiting] = []
        num_samples, done_s, most = 0, self._clock.monotonic_s() + self._pace.takes_s(1), 0
        while self._queue and not (batch and batch[0].is_alone):
            waiting = self._queue[0]
            if waiting.answer.done():
                self._leave()
            elif waiting.deadline_s < done_s:
                _fail(self._leave(), Expired(_TOO_LATE))
            elif waiting.deadline_s < done_s + delay_s or (batch and num_samples + waiting.num_samples > most):
                break
            elif batch and (waiting.is_alone or waiting.kind != batch[0].kind):
                others.append(self._queue.popleft())
            else:
                batch.append(self._leave())
                num_samples += waiting.num_samples
                most = most or self._most(waiting.deadline_s - self._clock.monotonic_s() - delay_s)
        self._queue.extendleft(reversed(others))
        return batch

    def _most(self, left_s: float) -> int:
        """Samples in a batch whose oldest has so long."""
        most = self._batching.max_samples
        num = self._pace.most_within(min(self._batching.max_batch_s, left_s), self._pace.worth(most))
        return num if num == most else round_size(num)

    def _finished(
        self, runner: Runner, batch: Sequence[_Waiting], begun_s: float, future: asyncio.Future[Done]
    ) -> None:
        """The next batch is under way before the answers of this one are told."""
        futures = self._at_work[runner]
        futures.remove(future)
        self._num_under_way -= 1
        result = _outcome(future, [waiting.num_samples for waiting in batch])
        is_lost, was_begun = isinstance(result, Lost), runner not in self._lost
        if isinstance(result, list):
            took_s = future.result().took_s
            self._measure(batch, self._clock.monotonic_s() - begun_s if took_s is None else took_s)
        elif is_lost or len(batch) > 1:
            self._put_back(batch, is_lost, was_begun)
        if futures and is_lost:  # what else it had was not begun
            self._gone.add(runner)
            self._lost.add(runner)
        elif not futures:
            del self._at_work[runner]
            if not (runner in self._gone or is_lost):
                self._idle.append(runner)
            self._gone.discard(runner)
            self._lost.discard(runner)
        self._dispatch()
        if isinstance(result, list):
            for waiting, answer in zip(batch, result, strict=True):
                self._answer(waiting, answer)
        elif not is_lost and len(batch) == 1:
            self._give_up(batch[0], result)

    def _answer(self, waiting: _Waiting, outputs: Arrays) -> None:
        if not waiting.answer.done():
            try:
                waiting.answer.set_result(waiting.make(outputs))
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                self._give_up(waiting, error)

    def _give_up(self, waiting: _Waiting, error: Exception) -> None:
        """It cannot be answered."""
        if self.on_failure is not None and not waiting.answer.done():
            self.on_failure(error)
        _fail(waiting, error)

    def _measure(self, batch: Sequence[_Waiting], took_s: float) -> None:
        num_samples = sum(waiting.num_samples for waiting in batch)
        if self.on_batch is not None:
            self.on_batch(num_samples, took_s)
        self._pace.add(num_samples, took_s)
        self._size = self._most(math.inf)
        self._size_s = self._pace.takes_s(self._size)

    def _put_back(self, batch: Sequence[_Waiting], is_lost: bool, was_begun: bool) -> None:
        """To the front, each by itself if it may be what is wrong."""
        for waiting in reversed(batch):
            waiting.is_alone = waiting.is_alone or was_begun
            waiting.num_lost += is_lost and was_begun
            if waiting.num_lost >= _MOST_LOST:
                self._give_up(waiting, Fault(f"{_MOST_LOST} processes of the model ended on this request"))
            else:
                self._queue.appendleft(waiting)
                self._count(waiting, 1)
                self._set_alarm(waiting.deadline_s)


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)


def _as_they_are(outputs: Arrays) -> Arrays:
    return outputs


def _outcome(future: asyncio.Future[Done], sizes: Sequence[int]) -> list[Arrays] | Exception:
    """Each request's outputs, or why there are none."""
    if future.cancelled():
        return Lost("the computation was given up")
    try:
        return _apart(future.result().outputs, sizes)
    except Exception as error:  # noqa: BLE001 - the model's own, for whoever asked it
        return error


def _together(many: Sequence[Arrays]) -> Arrays:
    if len(many) == 1:
        return many[0]
    return {name: np.concatenate([inputs[name] for inputs in many]) for name in many[0]}


def _apart(outputs: Arrays, sizes: Sequence[int]) -> list[Arrays]:
    if len(sizes) == 1:
        return [outputs]
    ends = list(itertools.accumulate(sizes))
    return [
        {name: array[end - size : end] for name, array in outputs.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]
