"""Steps with all that is trained in shards: a worker takes its lanes' part of one step after another at its own pace.

The shards' books say how far each lane is, on each shard; so who takes over a lost worker's lanes goes on where their
pushes ended, and does again for a shard only what that shard lacks. A round is as many steps, told of by all: who has a
lane at its end answers for all of its samples in the round, for the books have them, whoever computed them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shoal.errors import Bug, Diverged
from shoal.lanes import Ledger
from shoal.membership import Lanes
from shoal.sources import LocalBatch, Prefetch, count_samples
from shoal.strategies import Agreed, ParameterServer
from shoal.strategies.server import Served
from shoal.tables.consistency import NOW, Async
from shoal.training.computing import Scene, find_bad_lane, loss_of
from shoal.training.replica import seed_everything, step_seed
from shoal.training.round import Round

if TYPE_CHECKING:
    from shoal.shards.client import Pushing


@dataclass
class _Feed:
    """Samples that are read ahead, of some lanes from a step on."""

    lanes: tuple[int, ...]
    step: int
    loader: Prefetch


class ServedComputer:
    """An engine whose rounds are told of at their end, and were applied before."""

    def __init__(self, scene: Scene, first_step: int) -> None:
        strategy, session = scene.kit.job.strategy, scene.kit.replica.session
        assert isinstance(strategy, ParameterServer) and isinstance(session, Served) and scene.tables is not None
        self._scene = scene
        self._kit = scene.kit
        self._job = scene.kit.job
        self._session = session
        self._tables = scene.tables
        self._round_steps = strategy.round_steps
        self._most_in_flight = strategy.consistency.max_in_flight if isinstance(strategy.consistency, Async) else 1
        self._base = first_step
        self._lanes: tuple[int, ...] = ()
        self._done: dict[int, list[int]] = {}
        self._flights: deque[Pushing] = deque()
        self._feed: _Feed | None = None
        self._loss_sum, self._num_taken, self._mean = 0.0, 0, 0.0

    def deal(self, lanes: Lanes) -> None:
        self._lanes = tuple(lanes.get(self._scene.name, ()))
        self._done = self._tables.steps_done(self._lanes)

    def close(self) -> None:
        if self._feed is not None:
            self._feed.loader.close()
        self._feed = None

    def drain(self) -> Iterator[Round]:
        """Nothing is under way between two rounds."""
        return iter(())

    def find_bad_lane(self) -> int | None:
        return find_bad_lane(self._kit, self._base, self._lanes)

    def advance(self, last_step: int) -> Round:
        target = min(last_step, (self._base // self._round_steps + 1) * self._round_steps)
        self._loss_sum, self._num_taken = 0.0, 0
        while group := self._next_group(target):
            self._take(*group)
        while self._flights:
            self._tables.settled(self._flights.popleft())
        spans = self._kit.steps.spans(self._base, target)
        ledger = sum((Ledger.expected(span, self._lanes) for span in spans), Ledger())
        ballot = self._scene.ballot(target)
        held = self._kit.replica.step
        self._mean = self._loss_sum / self._num_taken if self._num_taken else self._mean
        roll = self._scene.roll_call(ballot.call(ledger, self._mean * ledger.count, bad=False))
        due = sum((Ledger.expected(span) for span in spans), Ledger())
        if roll.ledger != due:
            raise Bug(f"the steps from {self._base} to {target} took {roll.ledger.count} samples and not {due.count}")
        self._tables.step = NOW
        self._session.fetch(self._tables.pull)
        self._base = target
        epoch = self._kit.steps.locate(target - 1)[0]
        return Round(target, held, epoch, Agreed([], []), roll, ballot.order)

    def _next_group(self, target: int) -> tuple[int, tuple[int, ...]] | None:
        """The step that is due first, and the lanes that take it together: those that are as far on every shard. One
        that is further on some shards takes it alone, so that those know it again."""
        due = {lane: min(steps) for lane, steps in self._done.items() if min(steps) < target}
        if not due:
            return None
        step = min(due.values())
        lanes = [lane for lane, reached in due.items() if reached == step]
        uneven = [lane for lane in lanes if max(self._done[lane]) > step]
        return step, tuple(uneven[:1] or sorted(lanes))

    def _take(self, step: int, lanes: tuple[int, ...]) -> None:
        """A step's part of these lanes: pull, forward, backward, push."""
        local = self._read(step, lanes)
        self._kit.agent.at("compute", step=self._kit.replica.step)
        with self._scene.meter.computing(local.num_samples, self._session.times):
            self._scene.group.check()
            self._tables.take_up(local.batches, step)
            with self._session.times.spent("wait"):
                self._session.fetch(self._tables.pull)
            self._look_ahead(step + 1, lanes)
            seed_everything(step_seed(self._job.seed, step, lanes[0]))
            self._forward_and_backward(local, self._kit.steps.span(step).num_samples, step)
            with self._session.times.spent("wait"):
                while len(self._flights) >= self._most_in_flight:
                    self._tables.settled(self._flights.popleft())
            self._flights.append(self._tables.send(lanes, self._session.parts()))
        for lane in lanes:
            self._done[lane] = [step + 1] * len(self._done[lane])

    def _look_ahead(self, step: int, lanes: tuple[int, ...]) -> None:
        """Have the rows of the next step come while this one is computed, if it is these lanes' again."""
        assert self._feed is not None
        coming = self._feed.loader.peek()
        if coming is not None and coming.step == step and all(max(self._done[lane]) <= step for lane in lanes):
            self._tables.look_ahead(coming.batches, step)

    def _forward_and_backward(self, local: LocalBatch, total: int, step: int) -> None:
        for batch in local.batches:
            num_samples = count_samples(batch)
            loss = loss_of(self._job, self._kit.replica.model, batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise Diverged(f"the loss of step {step} is not a finite number", step=step)
            self._loss_sum += value * num_samples
            self._num_taken += num_samples
            (loss if num_samples == total else loss * (num_samples / total)).backward()  # type: ignore[no-untyped-call]

    def _read(self, step: int, lanes: tuple[int, ...]) -> LocalBatch:
        """The samples, read ahead as long as the same lanes go on."""
        if self._feed is None or (self._feed.lanes, self._feed.step) != (lanes, step):
            self.close()
            loader = Prefetch(
                self._kit.train_reader, self._kit.order_of_epoch, self._kit.steps, lanes,
                first_step=step, micro_batch=self._job.micro_batch,
            )  # fmt: skip
            self._feed = _Feed(lanes, step, loader)
        self._feed = replace(self._feed, step=step + 1)
        return next(self._feed.loader)
