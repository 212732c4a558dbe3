"""Requests that wait for the model, and go through it together: adaptive batches from a bounded queue.

A model that is idle takes what comes at once, so nobody waits for company. While it computes, requests gather; then it
takes as many as fit. What is beyond the queue's bounds is refused before it costs anything, so a server that is offered
twice what it can do still does all that it can. Who has given up is dropped before a computation, too.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.clock import Clock, SystemClock
from shoal.errors import ConfigError, Fault

Tensors = Mapping[str, Tensor]

_REMEMBERED = 0.9
"""Of the measured seconds a sample, with each batch."""


class Overloaded(Fault):
    """The queue is full. ``retry_after_s``: when there will be room, going by how fast it moves."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[Overloaded], tuple[str, float]]:
        return type(self), (self.message, self.retry_after_s)


class Expired(Fault):
    """The request's time was over before the model came to it."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """``max_samples``: that are computed at once. The queue holds at most ``max_requests`` and ``max_bytes`` of
    tensors, or a single request."""

    max_samples: int = 64
    max_requests: int = 512
    max_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_samples", "max_requests", "max_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class _Waiting:
    inputs: Tensors
    num_samples: int
    num_bytes: int
    kind: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes beyond the samples: what may go together."""
    deadline_s: float
    answer: asyncio.Future[Tensors]


class Batcher:
    """Within one event loop. ``predict`` runs in ``executor``, one batch at a time. Where a batch fails, each of its
    requests is computed by itself, so that one that the model cannot bear fails alone."""

    def __init__(
        self, predict: Callable[[Tensors], Tensors], executor: Executor, batching: Batching | None = None,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self._predict = predict
        self._executor = executor
        self._batching = batching or Batching()
        self._clock = clock or SystemClock()
        self._queue: deque[_Waiting] = deque()
        self._num_bytes = self._num_samples = 0
        self._sample_s = 0.0
        self._work: asyncio.Task[None] | None = None

    async def ask(self, inputs: Tensors, timeout_s: float) -> Tensors:
        """All outputs for these inputs, whose first axis counts samples. ``Overloaded`` if the queue is full,
        ``Expired`` if the model does not come to it in time, else whatever ``predict`` raises. Cancelled, it is not
        computed any more."""
        waiting = self._waiting(inputs, timeout_s)
        self._check_room(waiting)
        self._queue.append(waiting)
        self._count(waiting, 1)
        if self._work is None:
            self._work = asyncio.create_task(self._go_on())
        return await waiting.answer

    def _waiting(self, inputs: Tensors, timeout_s: float) -> _Waiting:
        return _Waiting(
            inputs,
            len(next(iter(inputs.values()))),
            sum(tensor.nbytes for tensor in inputs.values()),
            tuple((name, tuple(tensor.shape[1:])) for name, tensor in inputs.items()),
            self._clock.monotonic_s() + timeout_s,
            asyncio.get_running_loop().create_future(),
        )

    def _check_room(self, waiting: _Waiting) -> None:
        bounds = self._batching
        if len(self._queue) >= bounds.max_requests:
            self._forget_those_who_left()
        fits = len(self._queue) < bounds.max_requests and self._num_bytes + waiting.num_bytes <= bounds.max_bytes
        if fits or not self._queue:
            return
        raise Overloaded(
            f"{len(self._queue)} requests wait, with {self._num_bytes} bytes; there is room for {bounds.max_requests} "
            f"and {bounds.max_bytes}: try again later",
            max(1e-3, self._num_samples * self._sample_s),
        )

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

    async def _go_on(self) -> None:
        try:
            while batch := self._next():
                await self._compute(batch)
        finally:
            self._work = None

    def _next(self) -> list[_Waiting]:
        """The oldest, and as many more of its kind as fit; others keep their place. Who has given up is left out."""
        batch: list[_Waiting] = []
        others: list[_Waiting] = []
        num_samples, now_s = 0, self._clock.monotonic_s()
        while self._queue:
            waiting = self._queue[0]
            if waiting.answer.done():
                self._count(self._queue.popleft(), -1)
            elif waiting.deadline_s < now_s:
                self._count(self._queue.popleft(), -1)
                waiting.answer.set_exception(Expired("the model did not come to this request in its time"))
            elif batch and num_samples + waiting.num_samples > self._batching.max_samples:
                break
            elif batch and waiting.kind != batch[0].kind:
                others.append(self._queue.popleft())
            else:
                batch.append(self._queue.popleft())
                self._count(waiting, -1)
                num_samples += waiting.num_samples
        self._queue.extendleft(reversed(others))
        return batch

    async def _compute(self, batch: Sequence[_Waiting]) -> None:
        begun_s = self._clock.monotonic_s()
        sizes = [waiting.num_samples for waiting in batch]
        try:
            outputs = await self._run(_together([waiting.inputs for waiting in batch]))
            answers = _apart(outputs, sizes)
        except Exception as error:  # noqa: BLE001 - the model's own, for whoever asked it
            if len(batch) == 1:
                _fail(batch[0], error)
                return
            for waiting in batch:
                await self._compute([waiting])
            return
        took_s = (self._clock.monotonic_s() - begun_s) / sum(sizes)
        self._sample_s = took_s if not self._sample_s else _REMEMBERED * self._sample_s + (1 - _REMEMBERED) * took_s
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)

    async def _run(self, inputs: Tensors) -> Tensors:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._predict, inputs)


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)


def _together(many: Sequence[Tensors]) -> Tensors:
    if len(many) == 1:
        return many[0]
    return {name: torch.cat([inputs[name] for inputs in many]) for name in many[0]}


def _apart(outputs: Tensors, sizes: Sequence[int]) -> list[Tensors]:
    if len(sizes) == 1:
        return [outputs]
    split = {name: torch.split(tensor, list(sizes)) for name, tensor in outputs.items()}
    return [{name: parts[number] for name, parts in split.items()} for number in range(len(sizes))]
