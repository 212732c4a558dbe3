"""One worker in one generation: from its base version to the last step, or to the generation's end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from shoal.clock import SystemClock
from shoal.comm import messages as msg
from shoal.comm.collectives import Group, Seat
from shoal.comm.transfer import fetch
from shoal.errors import Bug, Diverged, Fault, ShoalError
from shoal.evaluation import evaluate
from shoal.lanes import Ledger
from shoal.membership import Lanes, Origin, Standing
from shoal.sources import Prefetch
from shoal.training.agent import Order
from shoal.training.computing import Ballot, Computer, find_bad_lane, part_of
from shoal.training.healing import Shadow
from shoal.training.kit import Kit
from shoal.training.replica import pack
from shoal.training.rollcall import Call, Roll
from shoal.training.scribe import Scribe
from shoal.versions import BackgroundWriter, Failed, Saved

_PAUSE_NUMBER = 1 << 20
_CONCLUDE_NUMBER = 1 << 21
_COPY_SILENCE_S = 10.0
_LONGER_THAN_STUCK_S = 60.0


class Member:
    """``run`` returns after the last step, or at the boundary where the generation was to pause (``paused``).

    It raises ``Halted`` or another ``Fault`` when the generation fails: the replica then stands at a committed step.
    """

    def __init__(self, kit: Kit, enter: msg.Enter, writer: Callable[[], BackgroundWriter]) -> None:
        self.paused = False
        self.group: Group | None = None
        self._kit = kit
        self._world = enter.world
        self._addresses = enter.addresses
        self._name = kit.assignment.name
        self._rank = enter.world.members.index(self._name)
        self._leader = next(m for m in enter.world.members if m not in enter.world.sources) == self._name
        self._lanes: Lanes = enter.world.lanes
        self._step = enter.world.base.step
        self._last_step = kit.steps.total_steps
        self._meeting = kit.agent.meeting()
        self._shadow: Shadow | None = None
        self._loader: Prefetch | None = None
        self._writer = writer
        self._scribe: Scribe | None = None
        self._evaluated_step = -1
        self._step_began_s = time.monotonic()
        self._step_s = 0.0
        self._losses: list[float] = []

    @property
    def step(self) -> int:
        """The group's committed step, which a member that heals may not hold yet."""
        return self._step

    # From the base version to the end

    def run(self) -> None:
        try:
            self._take_base()
            self._form()
            while not self.paused and self._step < self._last_step:
                self._take_step()
            if not self.paused:
                self._finish()
            elif self._kit.agent.leaves and len(self._world.members) == 1:
                self._store()  # no one else holds it
            self._tell_bytes()
        finally:
            self._kit.replica.reducer.roll_back()
            if self._loader is not None:
                self._loader.close()

    def _take_base(self) -> None:
        world, replica, agent = self._world, self._kit.replica, self._kit.agent
        agent.at("prepare", step=world.base.step)
        if replica.step > world.base.step:
            raise Fault(
                f"generation {world.generation} goes on from step {world.base.step}, and this worker is beyond it"
            )
        if world.origin is Origin.SEED:
            replica.plant()
        elif world.origin is Origin.STORE:
            if replica.standing() != world.base:
                replica.restore(self._kit.versions.read(world.base.step))
        elif self._name in world.sources:
            self._shadow = Shadow(replica, self._copy_of_base)
        if world.origin is not Origin.SEED and self._shadow is None and replica.standing() != world.base:
            raise Fault(f"generation {world.generation} goes on from step {world.base.step}, "
                        f"and this worker holds step {replica.step}", step=replica.step)  # fmt: skip
        if self._name in world.sources.values():
            self._kit.offerer.offer(str(world.generation), pack(replica.capture()))

    def _copy_of_base(self) -> Any:
        address = self._addresses[self._world.sources[self._name]]
        group_is_gone = lambda: self.group is not None and self.group.aborted  # noqa: E731
        number = str(self._world.generation)
        return fetch(address, self._kit.assignment.key, number, _COPY_SILENCE_S, group_is_gone)

    def _form(self) -> None:
        job = self._kit.job
        self._kit.agent.at("meet")
        seat = Seat(
            generation=self._world.generation,
            rank=self._rank,
            world_size=len(self._world.members),
            host=self._kit.assignment.host,
            device=job.device,
            timeout_s=job.patience.stuck_s + _LONGER_THAN_STUCK_S,
        )
        self.group = Group.form(seat, self._meeting)
        self._kit.agent.watch_over(self.group)
        self._computer = Computer(self._kit, self.group)
        if self._leader:
            self._scribe = Scribe(job, self._kit.replica, self._writer(), SystemClock())
        self._load()

    def _load(self) -> None:
        if self._loader is not None:
            self._loader.close()
        kit = self._kit
        self._loader = Prefetch(
            kit.train_reader, kit.order_of_epoch, kit.steps, self._lanes.get(self._name, ()),
            first_step=self._step, micro_batch=kit.job.micro_batch,
        )  # fmt: skip

    # One step

    def _take_step(self) -> None:
        self._evaluate_if_due()
        if self._scribe is not None:
            self._scribe.at_boundary(self._cursors)
        assert self._loader is not None and self.group is not None
        local = next(self._loader)
        span = self._kit.steps.span(self._step)
        part = part_of(span, self._world.members, self._lanes, self._name)
        order = self._kit.agent.order
        ballot = Ballot(_number(order), self._fingerprint_if_due())
        agreed, roll = self._computer.run(local, span.num_samples, part, ballot)
        self._check(roll)
        if roll.ledger != Ledger.expected(span):
            raise Bug(f"step {self._step} took {roll.ledger.count} samples and not its own {span.num_samples}")
        if not agreed.is_finite():
            raise Diverged(f"a gradient of step {self._step} is not a finite number", self._rank, None, self._step)
        if self._shadow is None:
            self._kit.replica.commit(agreed, roll.ledger)
        else:
            self._shadow.keep(agreed, roll.ledger)
        self._step += 1
        self._tell(roll, span.epoch)
        if self._shadow is not None:
            self._heal()
        if roll.order:
            assert order is not None
            self._obey(order)

    def _fingerprint_if_due(self) -> str:
        every = self._kit.job.fingerprint_every_steps
        due = self._step == self._world.base.step or self._step % every == 0
        return self._kit.replica.fingerprint() if due and self._shadow is None else ""

    def _check(self, roll: Roll) -> None:
        """What a roll call shows before its step is committed: all hold this version, and all is well with it."""
        if roll.fingerprints_differ:
            raise Fault("the members hold different states", self._rank, self._world.generation, self._step)
        if roll.num_bad:
            raise Diverged(f"the loss of step {self._step} is not a finite number", self._rank, None, self._step)
        self._kit.agent.at("compute", stable_step=self._step)
        if self._scribe is not None:
            self._scribe.stable(self._step)
            self._tell_stored()

    def _cursors(self) -> list[int]:
        return [int(cursor) for cursor in self._kit.steps.cursors(self._step)]

    def _heal(self) -> None:
        assert self._shadow is not None and self.group is not None
        while self._shadow.must_wait:
            self._shadow.wait(0.1)
            self.group.check()
        if self._shadow.advance(self._step_s / 2):
            self._shadow = None
            self._kit.agent.send(msg.Caught(generation=self._world.generation, step=self._step))

    def _obey(self, order: Order) -> None:
        match order:
            case msg.Pause():
                self.paused = True
            case msg.Conclude():
                self._last_step = self._step
            case msg.Deal():
                self._lanes = order.lanes
                self._kit.agent.heeded(order)
                self._load()
                taken = msg.Taken(generation=self._world.generation, number=order.number, step=self._step)
                self._kit.agent.send(taken)

    # What others are told

    def _tell(self, roll: Roll, epoch: int) -> None:
        now_s = time.monotonic()
        self._step_s, self._step_began_s = now_s - self._step_began_s, now_s
        loss = roll.loss_sum / roll.ledger.count
        per_s = roll.ledger.count / self._step_s
        self._kit.agent.at("compute", step=self._step, loss=loss, samples_per_s=per_s, epoch=epoch)
        self._losses.append(loss)
        every = self._kit.job.log_every_steps
        if self._leader and self._step % every == 0:
            loss = sum(self._losses) / len(self._losses)
            self._kit.agent.note("progress", step=self._step, epoch=epoch, loss=loss, num_steps=len(self._losses))
        if self._step % every == 0:
            self._losses.clear()

    def _tell_stored(self) -> None:
        assert self._scribe is not None
        for written in self._scribe.news():
            self._tell_written(written)

    def _tell_written(self, written: Saved | Failed) -> None:
        if isinstance(written, Saved):
            self._kit.agent.send(msg.Saved(standing=Standing(written.step, written.fingerprint)))
        else:
            self._kit.agent.note("store_failed", step=written.step, reason=written.reason)

    def _tell_bytes(self) -> None:
        """What this generation's collectives moved, as the leader's kernel counted it."""
        moved = self.group.wire_bytes() if self.group is not None and self._leader else None
        if moved is not None and self.group is not None:
            self._kit.agent.note("communicated", generation=self._world.generation, sent_bytes=moved[0],
                                 received_bytes=moved[1], raw_bytes=self.group.raw_bytes)  # fmt: skip

    # Measuring, and the end

    def _evaluate_if_due(self) -> None:
        every = self._kit.job.evaluate_every_steps
        if every and self._step % every == 0 and self._step > 0 and self._evaluated_step != self._step:
            self._evaluate()

    def _evaluate(self) -> dict[str, Any]:
        kit, group = self._kit, self.group
        assert group is not None
        if kit.test_reader is None:
            return {}
        self._evaluated_step = self._step
        kit.agent.at("evaluate")
        lanes = self._lanes.get(self._name, ())
        figures = evaluate(kit.job, kit.replica.model, kit.test_reader, lanes, group.all_gather, group.check)
        if self._leader:
            kit.agent.note("evaluated", step=self._step, figures=figures)
        return figures

    def _finish(self) -> None:
        """Agree that all hold the last version; store it; measure it."""
        kit = self._kit
        self._finish_healing()
        finite = kit.replica.all_finite()
        call = Call(Ledger(), 0.0, not finite, _number(kit.agent.order), kit.replica.fingerprint())
        roll = self._computer.roll_call(call)
        if roll.num_bad:
            raise Diverged(f"after step {self._step} a parameter is not a finite number", step=self._step)
        self._check(roll)
        if roll.order and isinstance(kit.agent.order, msg.Pause):
            self.paused = True
            return
        complete = self._step == kit.steps.total_steps
        figures = self._evaluate() if complete else {}
        stored = self._store()
        standing = kit.replica.standing()
        kit.agent.send(msg.Done(generation=self._world.generation, standing=standing, figures=figures, stored=stored))

    def _store(self) -> bool:
        if self._scribe is None:
            return False
        for written in self._scribe.store_now(self._cursors()):
            self._tell_written(written)
        return True

    def _finish_healing(self) -> None:
        assert self.group is not None
        while self._shadow is not None:
            self._shadow.wait(0.05)
            self.group.check()
            self._heal()

    def name_culprit(self, error: Diverged) -> str | None:
        """After ``Diverged``, which every member met at the same step: what to tell the coordinator, if we are to.

        Each looks for a lane of its own that gives it. If nobody finds one, the leader tells what is known.
        """
        lane = None
        if self._step < self._kit.steps.total_steps:
            lanes = tuple(self._lanes.get(self._name, ()))
            lane = find_bad_lane(self._kit, self._kit.steps.span(self._step), lanes)
        found = self._computer.roll_call(Call(Ledger(), 0.0, lane is not None, 0)).num_bad
        if lane is not None:
            return f"{error} (worker {self._name}, lane {lane})"
        return str(error) if self._leader and not found else None

    def store_last_good(self) -> None:
        """After ``Diverged``: the step that failed was not taken; store the version before it, if the leader can."""
        if self._scribe is None or self._shadow is not None or not self._kit.replica.all_finite():
            return
        try:
            self._store()
        except ShoalError as error:
            self._kit.agent.note("store_failed", step=self._step, reason=str(error))


def _number(order: Order | None) -> int:
    match order:
        case msg.Pause(at_boundary=True):
            return _PAUSE_NUMBER
        case msg.Conclude():
            return _CONCLUDE_NUMBER
        case msg.Deal():
            return order.number
    return 0
