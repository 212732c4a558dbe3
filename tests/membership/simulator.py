"""A run in a box: model workers and coordinators, every fault there is, and what must always hold."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from shoal.membership import Event, Lost, Origin, Phase, Redeal, Rules, Scaled, Stalled, World
from shoal.membership.balance import Cost
from shoal.membership.changes import Measured
from tests.membership.coordinators import Coordinator
from tests.membership.workers import Beat, Truth, Worker


class Cluster:
    """All processes of one run."""

    def __init__(self, rules: Rules, target: int, random: Random) -> None:
        self.rules = rules
        self.random = random
        self.target = target
        self.truth = Truth(rules.total_steps)
        self.workers: dict[str, Worker] = {}
        self.link_of: dict[str, Coordinator] = {}
        self.out: set[str] = set()
        self.said: list[tuple[Coordinator, str, Event | Beat]] = []
        self.num_balanced = 0
        self.measured_at_s = 0.0
        self.coordinators = [Coordinator(self, target)]

    @property
    def newest(self) -> Coordinator:
        return self.coordinators[-1]

    # What must always hold

    def check_deal(self, lanes: dict[str, tuple[int, ...]], members: tuple[str, ...], healing: frozenset[str]) -> None:
        dealt = sorted(lane for own in lanes.values() for lane in own)
        assert dealt == list(range(self.rules.num_lanes)), "every lane has exactly one host"
        assert set(lanes) <= set(members), "only members host lanes"
        assert not any(lanes.get(worker) for worker in healing), "who still heals has no lanes"

    def check_redeal(self, redeal: Redeal) -> None:
        world = self.truth.records[redeal.generation]
        caught_up = {w.name for w in self.workers.values() if w.generation >= world.generation and not w.shadows}
        self.check_deal(dict(redeal.lanes), redeal.members, frozenset(world.sources) - caught_up)
        self.num_balanced += redeal.reason == "balance"
        if redeal.reason == "balance" and len(redeal.members) <= self.rules.num_lanes:
            assert all(redeal.lanes[member] for member in redeal.members), "who has no lanes cannot be measured"

    def check_end(self, world: World) -> None:
        assert max(self.truth.store, default=-1) == self.rules.total_steps, "the last version is not stored"
        last = self.truth.present[world.generation, self.rules.total_steps]
        assert last.keys() == set(world.members), "a member has not committed the last step"

    def check_world(self, world: World, target: int, waiting: frozenset[str]) -> None:
        records, rules = self.truth.records, self.rules
        assert world.generation == max(records, default=0) + 1, "generations follow each other"
        assert len(set(world.members)) == len(world.members)
        assert rules.min_workers <= len(world.members) <= min(max(target, rules.min_workers), rules.max_workers)
        self.check_deal(dict(world.lanes), world.members, frozenset(world.sources))
        reported = {m: self.workers[m].held for m in world.members if self.workers[m].alive}
        newest = max((held.step for held in reported.values()), default=-1)
        assert world.base.step >= newest, "a version that a member holds was given up"
        assert world.base.step >= max(self.truth.store, default=0), "a stored version was given up"
        if world.origin is Origin.PEERS:
            assert all(reported.get(source, world.base) == world.base for source in world.sources.values())
            assert {m for m, held in reported.items() if held != world.base} <= set(world.sources)
        if records:
            self.out |= set(records[max(records)].members) - set(world.members) - waiting
        back = self.out & set(world.members)
        assert all(self.workers[name].generation == 0 for name in back), "who was left out came back with its state"
        self.out -= back

    # What happens

    def add_worker(self) -> None:
        worker = Worker(f"w{len(self.workers):03d}", self.truth)
        self.workers[worker.name] = worker
        self.link_of[worker.name] = self.newest
        worker.say_hello()

    def deliver_to_coordinator(self, worker: Worker) -> None:
        if worker.outbox:
            message = worker.outbox.popleft()
            self.said.append((self.link_of[worker.name], worker.name, message))
            self.link_of[worker.name].handle(worker.name, message)

    def relink(self, worker: Worker) -> None:
        """Its connection moves to the newest coordinator; what was under way is lost."""
        if self.link_of[worker.name] is not self.newest:
            self.link_of[worker.name] = self.newest
            worker.inbox.clear()
            if self.random.random() < 0.5:
                worker.outbox.clear()
            worker.outbox.append(Beat())

    def replace_coordinator(self) -> None:
        """A new one begins; the old one may not know it yet."""
        self.newest.over |= self.random.random() < 0.7
        self.coordinators.append(Coordinator(self, self.target))

    def peers_of(self, worker: Worker) -> list[Worker]:
        members = worker.world.members if worker.world else ()
        return [self.workers[m] for m in members if m != worker.name]

    def has_fault(self, worker: Worker) -> bool:
        """Whether its collectives fail: a peer is gone, or has left this generation unfinished."""
        done = self.truth.present.get((worker.generation, self.rules.total_steps), {})
        return any(
            not p.alive or p.generation > worker.generation
            or (p.generation == worker.generation and p.rests and p.name not in done)
            for p in self.peers_of(worker)
        )  # fmt: skip

    # Chance

    def happen(self) -> None:
        """One event, drawn at random."""
        name = self.random.choice(_EVENTS)
        if name in _ON_CLUSTER:
            _ON_CLUSTER[name](self)
            return
        alive = [w for w in self.workers.values() if w.alive]
        if alive:
            _ON_WORKER[name](self, self.random.choice(alive))

    def duplicate(self) -> None:
        if self.said:
            coordinator, worker, message = self.random.choice(self.said[-50:])
            coordinator.handle(worker, message)

    def scale(self) -> None:
        self.target = self.random.randint(self.rules.min_workers, self.rules.max_workers)
        self.newest.apply(Scaled(self.target))

    def stall(self) -> None:
        coordinator = self.random.choice(self.coordinators)
        coordinator.apply(Stalled(coordinator.state.generation - self.random.choice((0, 0, 1))))

    def measure(self) -> None:
        """Some coordinator gets figures, most often several times on end; some are of an earlier generation."""
        coordinator, speeds = self.random.choice(self.coordinators), [self.random.choice((1, 1, 5)) for _ in range(5)]
        state = coordinator.state
        for _ in range(self.random.randint(1, 6)):
            self.measured_at_s += self.random.choice((0.5, 0.5, 5.0))
            lanes = coordinator.state.world.lanes if coordinator.state.world else {}
            costs = {
                m: self.cost(len(lanes.get(m, ())), speed) for m, speed in zip(state.members, speeds, strict=False)
            }
            coordinator.apply(Measured(state.generation - self.random.choice((0, 0, 0, 1)), self.measured_at_s, costs))

    def cost(self, num_lanes: int, speed: float) -> Cost:
        """What so many lanes cost, or what no one should believe."""
        nonsense = Cost(self.random.choice((0.0, -1.0, float("nan"), float("inf"))), num_lanes)
        return Cost(num_lanes / speed, num_lanes) if self.random.random() < 0.95 else nonsense

    def cut(self) -> None:
        pair = self.random.sample(sorted(self.workers), 2) if len(self.workers) > 1 else []
        if pair:
            self.truth.cuts ^= {frozenset(pair)}

    def advance(self, worker: Worker) -> None:
        if not worker.trains:
            return
        if worker.shadows and self.random.random() < 0.4:
            self.heal(worker)
        elif not worker.move() and self.has_fault(worker):
            worker.stop()
        elif self.random.random() < 0.3:
            worker.save_newest_stable()

    def heal(self, worker: Worker) -> bool:
        assert worker.world is not None
        source = self.workers[worker.world.sources[worker.name]]
        if source.alive and not source.frozen:
            return worker.heal()
        worker.stop()
        return True

    def lose(self, worker: Worker) -> None:
        self.link_of[worker.name].apply(Lost(worker.name, "suspected"))

    # Settling

    def settle(self) -> None:
        """No more faults: every message arrives, every clock runs out, who is missing is replaced. Then it ends."""
        for _ in range(400):
            if self.newest.ended:
                break
            if not self._settle_once():
                self._awaken()
        state = self.newest.state
        assert self.newest.ended, f"the run stands still: {state}"
        assert not state.leaving & set(state.members) or state.healing, "who asked to leave was kept to the end"

    def _awaken(self) -> None:
        """Nothing moves: what time alone would bring."""
        if self.newest.over:
            self.replace_coordinator()
        coordinator = self.newest
        lost = [w for w in sorted(coordinator.state.present) if not self.workers[w].acts]
        for name in lost:
            coordinator.apply(Lost(name, "silent"))
        if not lost and coordinator.state.phase in (Phase.RUNNING, Phase.HALTING) and self.truth.cuts:
            coordinator.apply(Stalled(coordinator.state.generation))
        if not lost and coordinator.deadline is not None and coordinator.state.phase is not Phase.RUNNING:
            coordinator.fire_deadline()
        for worker in self.workers.values():
            if worker.acts and worker.generation == 0:
                worker.say_hello()
        needed = min(max(self.target, self.rules.min_workers), self.rules.max_workers)
        cut = frozenset().union(*self.truth.cuts)
        while sum(w.acts and not w.wants_to_leave and w.name not in cut for w in self.workers.values()) < needed:
            self.add_worker()

    def _settle_once(self) -> bool:
        moved = False
        for worker in [w for w in self.workers.values() if w.acts]:
            moved |= self.link_of[worker.name] is not self.newest
            self.relink(worker)
            while worker.outbox or (worker.inbox and worker.acts):
                moved = True
                if worker.inbox:
                    worker.receive()
                else:
                    self.deliver_to_coordinator(worker)
            if worker.trains:
                progressed = (worker.shadows and self.heal(worker)) or worker.move()
                if not progressed and self.has_fault(worker):
                    worker.stop()
                    progressed = True
                moved |= progressed
        return moved


def _set(attribute: str, value: bool) -> Callable[[Cluster, Worker], None]:
    return lambda cluster, worker: setattr(worker, attribute, value)


_ON_CLUSTER: dict[str, Callable[[Cluster], None]] = {
    "join": Cluster.add_worker,
    "scale": Cluster.scale,
    "stall": Cluster.stall,
    "measure": Cluster.measure,
    "cut": Cluster.cut,
    "duplicate": Cluster.duplicate,
    "deadline": lambda cluster: cluster.random.choice(cluster.coordinators).fire_deadline(),
    "replace coordinator": Cluster.replace_coordinator,
}
_ON_WORKER: dict[str, Callable[[Cluster, Worker], None]] = {
    "say": Cluster.deliver_to_coordinator,
    "hear": lambda cluster, worker: worker.receive() if worker.inbox and worker.acts else None,
    "advance": Cluster.advance,
    "kill": _set("alive", False),
    "freeze": _set("frozen", True),
    "thaw": _set("frozen", False),
    "leave": lambda cluster, worker: worker.ask_to_leave(),
    "lose": Cluster.lose,
    "relink": Cluster.relink,
    "beat": lambda cluster, worker: worker.outbox.append(Beat()),
    "fail": lambda cluster, worker: worker.stop() if worker.trains and cluster.has_fault(worker) else None,
}
_WEIGHTS = {
    "say": 22, "hear": 22, "advance": 50, "join": 5, "duplicate": 2, "lose": 1, "kill": 2, "freeze": 1, "thaw": 2,
    "leave": 1, "scale": 1, "stall": 1, "cut": 1, "measure": 4, "deadline": 1, "replace coordinator": 1, "relink": 3,
    "beat": 2, "fail": 3,
}  # fmt: skip
_EVENTS = [name for name, weight in _WEIGHTS.items() for _ in range(weight)]


def play(random: Random, num_events: int) -> Cluster:
    """A whole run: so many random events, then peace until it ends."""
    least = random.randint(1, 3)
    rules = Rules(
        num_lanes=5, min_workers=least, max_workers=random.randint(least, 5), total_steps=random.randint(1, 12)
    )
    cluster = Cluster(rules, random.randint(least, rules.max_workers), random)
    for _ in range(least):
        cluster.add_worker()
    for _ in range(num_events):
        cluster.happen()
    cluster.settle()
    return cluster
