"""Steps: one worker's part of one after another, with a gradient agreed on at each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.comm import messages as msg
from shoal.comm.collectives import Group, Work
from shoal.errors import Bug, Diverged
from shoal.job import Batch, Job
from shoal.lanes import Ledger, Span
from shoal.membership import Lanes
from shoal.sources import LocalBatch, Prefetch, count_samples, to_device
from shoal.strategies import Reducer, Share
from shoal.training.agent import Order
from shoal.training.kit import Kit
from shoal.training.meter import Meter
from shoal.training.replica import check_loss, seed_everything, step_seed
from shoal.training.rollcall import Call, Roll, decode, encode
from shoal.training.round import Round

if TYPE_CHECKING:
    from shoal.shards.session import TableSession


@dataclass(frozen=True)
class Ballot:
    """What this worker has to say in a roll call besides its samples: see ``Call``."""

    order: Order | None
    fingerprint: str
    due: bool

    def call(self, ledger: Ledger, loss_sum: float, *, bad: bool) -> Call:
        """With the samples."""
        return Call(ledger, loss_sum, bad, number_of(self.order), self.fingerprint, self.due)


@dataclass(frozen=True)
class Part:
    """This worker's part of a step among all members' parts."""

    share: Share
    first_lane: int


def part_of(span: Span, members: Sequence[str], lanes: Lanes, name: str) -> Part:
    """How a step's samples fall to ``name``: its fraction, and whether it is the first member that has any."""
    counts = span.stops - span.starts
    held = {member: int(counts[list(lanes.get(member, ()))].sum()) for member in members}
    leader = next(member for member in members if held[member])
    own = lanes.get(name, ())
    return Part(Share(held[name] / span.num_samples, leader == name), own[0] if own else 0)


class Engine(Protocol):
    """Computes one round after another, among one group. Its rounds are to be committed in order, each at once."""

    def deal(self, lanes: Lanes) -> None:
        """Whose lanes are whose from the committed version on. Only while nothing is under way."""
        ...

    def advance(self, last_step: int) -> Round:
        """The next round, which every member has contributed all of its part to. It may begin the one after it."""
        ...

    def drain(self) -> Iterator[Round]:
        """The rounds that are under way, without beginning others."""
        ...

    def find_bad_lane(self) -> int | None:
        """After a loss or gradient that is no finite number: a lane of this worker's that gives one."""
        ...

    def close(self) -> None:
        """Stop what is read ahead."""
        ...


@dataclass(frozen=True)
class Scene:
    """Where an engine works: what a worker has, the group, the members by rank, how it votes and where it counts."""

    kit: Kit
    group: Group
    members: tuple[str, ...]
    ballot: Callable[[int], Ballot]
    meter: Meter
    tables: TableSession | None = None

    @property
    def name(self) -> str:
        return self.kit.assignment.name

    def call(self, call: Call) -> tuple[Work, Tensor]:
        """Start a roll call."""
        tensor = encode(call).to(self.kit.job.device)
        return self.group.all_reduce(tensor), tensor

    def roll_call(self, call: Call) -> Roll:
        """A roll call without a round."""
        self.kit.agent.at("wait")
        work, summed = self.call(call)
        work.wait()
        return decode(summed)


@dataclass(frozen=True)
class _Flight:
    """A step that is computed and not agreed on yet."""

    step: int
    epoch: int
    work: Work
    summed: Tensor
    held: int
    order: Order | None
    sealed: tuple[Work, Tensor] | None


class Computer:
    """Takes a worker's part of one step after another: forward, roll call, backward with the exchange under way."""

    def __init__(self, scene: Scene, first_step: int) -> None:
        self._scene = scene
        self._kit = scene.kit
        self._job = scene.kit.job
        self._next = first_step
        self._lanes: Lanes = {}
        self._loader: Prefetch | None = None
        self._flights: deque[_Flight] = deque()
        self._refusal: Diverged | None = None
        session = scene.kit.replica.session
        assert isinstance(session, Reducer)
        self._session = session

    def deal(self, lanes: Lanes) -> None:
        self.close()
        self._lanes = lanes
        self._loader = Prefetch(
            self._kit.train_reader, self._kit.order_of_epoch, self._kit.steps, lanes.get(self._scene.name, ()),
            first_step=self._next, micro_batch=self._job.micro_batch,
        )  # fmt: skip

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def advance(self, last_step: int) -> Round:
        while len(self._flights) <= self._session.delay and self._next < last_step:
            self._compute()
        return self._finish()

    def drain(self) -> Iterator[Round]:
        while self._flights:
            yield self._finish()

    def find_bad_lane(self) -> int | None:
        step = self._kit.replica.step
        if step >= self._kit.steps.total_steps:
            return None
        return find_bad_lane(self._kit, step, tuple(self._lanes.get(self._scene.name, ())))

    def _compute(self) -> None:
        """This worker's part of the next step, its exchange begun."""
        kit, step = self._kit, self._next
        assert self._loader is not None
        local = next(self._loader)
        span = kit.steps.span(step)
        part = part_of(span, self._scene.members, self._lanes, self._scene.name)
        kit.agent.at("compute", step=kit.replica.step)
        held = kit.replica.step
        with self._scene.meter.computing(local.num_samples, self._session.times):
            seed_everything(step_seed(self._job.seed, step, part.first_lane))
            self._session.begin(self._scene.group, step)
            ballot = self._scene.ballot(step + 1)
            if self._scene.tables is not None:
                self._scene.tables.take_up(local.batches, step)
            work, summed = self._forward_and_backward(local, span.num_samples, ballot)
            self._session.launch(part.share)
        sealed = self._seal() if self._scene.tables is not None else None
        self._flights.append(_Flight(step, local.epoch, work, summed, held, ballot.order, sealed))
        self._next += 1

    def _seal(self) -> tuple[Work, Tensor]:
        """Tell the others that the shards have this worker's part of the step: without that nobody commits it."""
        tables = self._scene.tables
        assert tables is not None
        self._kit.agent.at("wait")
        self._refusal = tables.settle()
        flag = torch.tensor([float(self._refusal is not None)], device=self._job.device)
        return self._scene.group.all_reduce(flag), flag

    def _finish(self) -> Round:
        """Once this returns every member has contributed all of its part; nothing is committed yet."""
        flight = self._flights[0]
        self._kit.agent.at("wait")
        agreed = self._session.finish()
        self._session.times.await_(flight.work)
        if flight.sealed is not None:
            self._session.times.await_(flight.sealed[0])
            if float(flight.sealed[1]):
                reason = str(self._refusal or f"a gradient of a table's rows in step {flight.step} is not finite")
                raise Diverged(reason, self._scene.group.seat.rank, None, flight.step)
        self._flights.popleft()
        roll = decode(flight.summed)
        span = self._kit.steps.span(flight.step)
        if not roll.num_bad and roll.ledger != Ledger.expected(span):
            raise Bug(f"step {flight.step} took {roll.ledger.count} samples and not its own {span.num_samples}")
        return Round(flight.step + 1, flight.held, flight.epoch, agreed, roll, flight.order)

    def _forward_and_backward(self, local: LocalBatch, total: int, ballot: Ballot) -> tuple[Work, Tensor]:
        loss_sum, bad = 0.0, False
        for position, batch in enumerate(local.batches):
            num_samples = count_samples(batch)
            loss = loss_of(self._job, self._kit.replica.model, batch)
            value = float(loss.detach())
            bad = bad or not math.isfinite(value)
            loss_sum += 0.0 if bad else value * num_samples
            if position == len(local.batches) - 1:
                answer = self._scene.call(ballot.call(local.ledger, loss_sum, bad=bad))
                self._session.arm()
            if not bad:
                (loss if num_samples == total else loss * (num_samples / total)).backward()  # type: ignore[no-untyped-call]
        if not local.batches:
            answer = self._scene.call(ballot.call(Ledger(), 0.0, bad=False))
        if self._scene.tables is not None:
            self._scene.tables.push(tuple(self._lanes.get(self._scene.name, ())), keep=not bad)
            coming = self._loader.peek() if self._loader is not None else None
            if coming is not None:
                self._scene.tables.look_ahead(coming.batches, coming.step)
        return answer


def loss_of(job: Job, model: torch.nn.Module, batch: Batch) -> Tensor:
    """The task's loss on a batch, on the job's device and in its precision."""
    with torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.precision == "bf16"):
        loss = job.task.loss(model, to_device(batch, job.device))
    check_loss(loss)
    return loss


def find_bad_lane(kit: Kit, step: int, lanes: tuple[int, ...]) -> int | None:
    """The first of these lanes whose samples in this step give a loss or a gradient that is not finite."""
    span = kit.steps.span(step)
    order = kit.order_of_epoch(span.epoch)
    counts = np.asarray(span.stops) - np.asarray(span.starts)
    parameters = [p for p in kit.replica.model.parameters() if p.requires_grad]
    for lane in (lane for lane in lanes if counts[lane]):
        batch = kit.train_reader.gather(order.slice(lane, int(span.starts[lane]), int(span.stops[lane])))
        loss = loss_of(kit.job, kit.replica.model, batch)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (loss, *gradients)):
            return lane
    return None


_PAUSE_NUMBER = 1 << 20
_CONCLUDE_NUMBER = 1 << 21


def number_of(order: Order | None) -> int:
    """What stands for an order in a roll call; 0 for none, and for one that is no matter of a boundary."""
    match order:
        case msg.Pause(at_boundary=True):
            return _PAUSE_NUMBER
        case msg.Conclude():
            return _CONCLUDE_NUMBER
        case msg.Deal():
            return order.number
    return 0
