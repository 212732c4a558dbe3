"""One worker in one generation: from its base version to the last step, or to the generation's end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shoal.clock import SystemClock
from shoal.comm import messages as msg
from shoal.comm.collectives import Group, Seat
from shoal.comm.transfer import fetch
from shoal.errors import Diverged, Fault, ShoalError, StoreFault
from shoal.evaluation import evaluate
from shoal.lanes import Ledger
from shoal.membership import Lanes, Origin, Standing
from shoal.strategies import Served
from shoal.tables.consistency import ANYWHERE, NOW
from shoal.training.agent import Order
from shoal.training.computing import Ballot, Computer, Engine, Scene, number_of
from shoal.training.healing import Shadow
from shoal.training.kit import Kit
from shoal.training.levelling import level
from shoal.training.local import LocalComputer
from shoal.training.meter import Meter
from shoal.training.replica import pack
from shoal.training.rollcall import Call, Roll
from shoal.training.round import Round
from shoal.training.scribe import Scribe
from shoal.training.served import ServedComputer
from shoal.versions import BackgroundWriter, Failed, Saved

if TYPE_CHECKING:
    from shoal.shards.session import TableSession

_COPY_SILENCE_S = 10.0
_LONGER_THAN_STUCK_S = 60.0
_HASTE_S, _ANSWER_S = 0.3, 0.1


class Member:
    """``run`` returns after the last step, or at the boundary where the generation was to pause (``paused``).

    It raises ``Halted`` or another ``Fault`` when the generation fails: the replica then stands at a committed step.
    """

    def __init__(
        self, kit: Kit, enter: msg.Enter, writer: Callable[[], BackgroundWriter], tables: TableSession | None = None
    ) -> None:
        self.paused = False
        self.has_begun = False
        """Whether its tables stand at the generation's base."""
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
        self._engine: Engine | None = None
        self._writer = writer
        self._tables = tables
        self._scribe: Scribe | None = None
        self._evaluated_step = enter.world.base.step
        self._compared_step = -1
        self._hastened = False
        self._round_began_s = time.monotonic()
        self._round_s = 0.0
        self._figures: dict[str, float] = {}
        self._participation = (0, 0, 0)
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
                self._take_round()
            if not self.paused:
                self._finish()
            elif self._kit.agent.leaves and len(self._world.members) == 1:
                self._store()  # no one else holds it
            self._tell_bytes()
        finally:
            self._kit.replica.session.roll_back()
            if self._engine is not None:
                self._engine.close()

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
                replica.restore(self._kit.versions.read(world.base.step), len(world.members))
        elif self._name in world.sources:
            self._adopt(world.base.step)
            self._shadow = Shadow(replica, self._copy_of_base)
        if world.origin is not Origin.SEED and self._shadow is None and replica.standing() != world.base:
            raise Fault(f"generation {world.generation} goes on from step {world.base.step}, "
                        f"and this worker holds step {replica.step}", step=replica.step)  # fmt: skip
        if self._shadow is None:
            replica.session.memories.forget()
        if self._name in world.sources.values():
            self._kit.offerer.offer(str(world.generation), pack(replica.capture()))

    def _adopt(self, version: int) -> None:
        """The others hold ``version``: what was computed here on another is for nothing."""
        dropped = self._kit.replica.fall_behind(version)
        if dropped:
            self._kit.agent.note("residual_dropped", worker=self._name, norm=dropped, reason="it had fallen behind")

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
        self._scene = Scene(
            self._kit, self.group, self._world.members, self._ballot, Meter(self.group), self._tables
        )  # fmt: skip
        if self._tables is not None:
            base = ANYWHERE if self._is_served else self._world.base.step
            self._tables.begin(self._world.generation, base, self.group.check)
            if self._is_served:
                self._tables.check_reach(self._kit.versions.newest() or 0)
            if self._leader:
                self._tell_tables()
        self.has_begun = True
        self._engine = self._new_engine()
        if self._leader:
            self._scribe = Scribe(job, self._kit.replica, self._writer(), SystemClock())
        self._engine.deal(self._lanes)

    @property
    def _is_served(self) -> bool:
        return isinstance(self._kit.replica.session, Served)

    def _new_engine(self) -> Engine:
        if self._is_served:
            return ServedComputer(self._scene, self._step)
        return (LocalComputer if self._kit.replica.is_local else Computer)(self._scene, self._step)

    # One round

    def _take_round(self) -> None:
        self._evaluate_if_due()
        stores = self._scribe is not None and not self._kit.replica.has_private_state
        if stores and self._scribe is not None and self._scribe.at_boundary(self._cursors) and not self._marked():
            self._scribe.discard()
        assert self._engine is not None
        if self._shadow is not None and self._kit.replica.is_local and not self._hastened:
            self._hasten()
        done = self._engine.advance(self._last_step)
        self._commit(done)
        if done.roll.order or done.roll.due:
            for other in self._engine.drain():
                self._commit(other)
            if done.roll.due:
                self._make_version()
            if done.roll.order:
                assert done.order is not None
                self._obey(done.order)

    def _ballot(self, version: int) -> Ballot:
        """What this member has to say in the roll call of the round that leads to ``version``."""
        private = self._scribe is not None and self._kit.replica.has_private_state
        due = private and self._scribe is not None and self._scribe.is_due(version)
        return Ballot(self._kit.agent.order, self._fingerprint_if_due(), due)

    def _fingerprint_if_due(self) -> str:
        if self._shadow is not None:
            return ""
        step, every = self._kit.replica.step, self._kit.job.fingerprint_every_steps
        due = self._compared_step < 0 or step // every > self._compared_step // every
        self._compared_step = step if due else self._compared_step
        return self._kit.replica.fingerprint() if due else ""

    def _commit(self, done: Round) -> None:
        self._check(done.roll, done.held)
        if not done.agreed.is_finite():
            raise Diverged(f"a gradient of step {self._step} is not a finite number", self._rank, None, self._step)
        replica = self._kit.replica
        replica.session.remember(done.version)
        if self._shadow is None:
            replica.commit(done)
        else:
            self._shadow.keep(done)
        num_steps, self._step = done.version - self._step, done.version
        self._tell(done, num_steps)
        if self._shadow is not None:
            self._heal()

    def _check(self, roll: Roll, held: int) -> None:
        """What a roll call shows before its round is committed: all hold this version, and all is well with it."""
        if roll.fingerprints_differ:
            raise Fault("the members hold different states", self._rank, self._world.generation, self._step)
        if roll.num_bad:
            raise Diverged(f"the loss of step {self._step} is not a finite number", self._rank, None, self._step)
        self._kit.agent.at("compute", stable_step=held)
        if self._scribe is not None:
            self._scribe.stable(held)
            self._tell_stored()

    def _make_version(self) -> None:
        """What each member has for itself is spread evenly; the leader then copies the version, to be stored."""
        num_active = self._level()
        if self._scribe is not None and self._marked():
            self._scribe.capture(self._cursors(), num_active)

    def _marked(self) -> bool:
        """Whether the shards have marked the version that is about to be stored; if not, training goes on without."""
        try:
            self._mark()
        except StoreFault as error:
            self._kit.agent.note("store_failed", step=self._step, reason=str(error))
            return False
        return True

    def _mark(self) -> None:
        """Have the shards remember the tables of a version that is going to be stored, and of those that are."""
        if self._tables is not None:
            self._tables.mark(self._step, self._kit.versions.steps())

    def _level(self) -> int:
        assert self.group is not None
        self._kit.agent.at("wait")
        return level(self._kit.replica, self.group, active=self._shadow is None)

    def _cursors(self) -> list[int]:
        cursors = [int(cursor) for cursor in self._kit.steps.cursors(self._step)]
        for lane, step in self._kit.replica.lagging.items():
            cursors[lane] = int(self._kit.steps.cursors(step)[lane])
        return cursors

    def _heal(self) -> None:
        assert self._shadow is not None and self.group is not None
        while self._shadow.must_wait:
            self._shadow.wait(0.1)
            self.group.check()
        if self._shadow.advance(self._round_s / 2):
            self._shadow = None
            self._kit.agent.send(msg.Caught(generation=self._world.generation, step=self._step))

    def _hasten(self) -> None:
        """While the others are at a long round: whoever holds their version before its roll call has lanes in the next
        round, and else only in the one after. If the others are there first they wait a little."""
        self._hastened = True
        if self._shadow is not None:
            self._shadow.wait(_HASTE_S)
            self._heal()
        until_s = time.monotonic() + (0.0 if self._shadow is not None else _ANSWER_S)
        while self._kit.agent.order is None and time.monotonic() < until_s:
            self._scene.group.check()
            time.sleep(_ANSWER_S / 20)

    def _obey(self, order: Order) -> None:
        match order:
            case msg.Pause():
                self._hand_over(order)
                self.paused = True
            case msg.Conclude():
                self._last_step = self._step
            case msg.Deal():
                self._lanes = order.lanes
                self._kit.agent.heeded(order)
                assert self._engine is not None
                self._engine.deal(self._lanes)
                taken = msg.Taken(generation=self._world.generation, number=order.number, step=self._step)
                self._kit.agent.send(taken)

    def _hand_over(self, pause: msg.Pause) -> None:
        """What the leavers have not sent yet goes to those who stay."""
        stay = set(self._world.members) - set(pause.leaving)
        memories = self._kit.replica.session.memories
        if pause.leaving and stay and memories.keeps_residuals:
            assert self.group is not None
            memories.level(self.group, active=self._name in stay and self._shadow is None)

    # What others are told

    def _tell(self, done: Round, num_steps: int) -> None:
        now_s = time.monotonic()
        self._round_s, self._round_began_s = now_s - self._round_began_s, now_s
        count = done.roll.ledger.count
        loss, per_s = done.roll.loss_sum / count, count / self._round_s
        measured = self._scene.meter.committed(num_steps, self._kit.replica.session.times)
        memories = self._kit.replica.session.memories
        if measured and memories.keeps_residuals:
            measured["residual_norm"] = memories.norm()
        self._figures = {**self._figures, "loss": loss, "samples_per_s": per_s, "epoch": done.epoch, **measured}
        self._kit.agent.at("compute", step=self._step)
        self._kit.agent.tell(self._figures)
        self._losses += [loss] * num_steps
        every = self._kit.job.log_every_steps
        if self._step // every > (self._step - num_steps) // every:
            if self._leader:
                mean, count = sum(self._losses) / len(self._losses), len(self._losses)
                self._kit.agent.note("progress", step=self._step, epoch=done.epoch, loss=mean, num_steps=count)
                self._tell_tables()
            self._losses.clear()
        self._tell_participation(done)

    def _tell_tables(self) -> None:
        if self._tables is not None:
            self._kit.agent.note("tables", step=self._step, shards=self._tables.figures())

    def _tell_participation(self, done: Round) -> None:
        """Who took part, whenever that changes: of a round of local steps the lost do not."""
        if done.flags is None or not self._leader:
            return
        counts = (done.roll.num_present, sum(bool(own) for own in self._lanes.values()), done.num_contributors)
        if counts != self._participation:
            self._participation = counts
            alive, taking_part, committed = counts
            self._kit.agent.note(
                "participation", step=self._step, alive=alive, taking_part=taking_part, committed=committed,
                lagging_lanes=int((done.flags == 0).sum()),
            )  # fmt: skip

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
        moved = self.group.traffic() if self.group is not None and self._leader else None
        if moved is not None and self.group is not None:
            self._kit.agent.note("communicated", generation=self._world.generation, sent_bytes=moved.sent_bytes,
                                 received_bytes=moved.received_bytes, raw_bytes=self.group.raw_bytes)  # fmt: skip

    # Measuring, and the end

    def _evaluate_if_due(self) -> None:
        every = self._kit.job.evaluate_every_steps
        if every and self._step // every > max(0, self._evaluated_step) // every:
            self._evaluate()

    def _evaluate(self) -> dict[str, Any]:
        kit, group = self._kit, self.group
        assert group is not None
        if kit.test_reader is None:
            return {}
        self._evaluated_step = self._step
        kit.agent.at("evaluate")
        if self._tables is not None:
            self._tables.step = NOW if self._is_served else self._step
        lanes = self._lanes.get(self._name, ())
        with kit.replica.committed():
            figures = evaluate(kit.job, kit.replica.model, kit.test_reader, lanes, group.all_gather, group.check)
        if self._leader:
            kit.agent.note("evaluated", step=self._step, figures=figures)
        return figures

    def _finish(self) -> None:
        """Agree that all hold the last version; store it; measure it."""
        kit = self._kit
        self._finish_healing()
        finite = kit.replica.all_finite()
        order = kit.agent.order
        roll = self._scene.roll_call(Call(Ledger(), 0.0, not finite, number_of(order), kit.replica.fingerprint()))
        if roll.num_bad:
            raise Diverged(f"after step {self._step} a parameter is not a finite number", step=self._step)
        self._check(roll, self._step)
        if roll.order and isinstance(order, msg.Pause):
            self.paused = True
            return
        complete = self._step == kit.steps.total_steps
        figures = self._evaluate() if complete else {}
        stored = self._store()
        standing = kit.replica.standing()
        kit.agent.send(msg.Done(generation=self._world.generation, standing=standing, figures=figures, stored=stored))

    def _store(self) -> bool:
        """All members take part; the leader stores."""
        num_active = self._level() if self._kit.replica.has_private_state else None
        return self._write(num_active)

    def _write(self, num_active: int | None = None) -> bool:
        if self._scribe is None:
            return False
        self._mark()
        for written in self._scribe.store_now(self._cursors(), num_active):
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
        assert self._engine is not None
        lane = self._engine.find_bad_lane()
        found = self._scene.roll_call(Call(Ledger(), 0.0, lane is not None, 0)).num_bad
        if lane is not None:
            return f"{error} (worker {self._name}, lane {lane})"
        return str(error) if self._leader and not found else None

    def store_last_good(self) -> None:
        """After ``Diverged``: the step that failed was not taken; store the version before it, if the leader can."""
        if self._scribe is None or self._shadow is not None or not self._kit.replica.all_finite():
            return
        try:
            self._write()
        except ShoalError as error:
            self._kit.agent.note("store_failed", step=self._step, reason=str(error))
