"""The coordinator's process without its sockets: what it does with what the store and the driver know."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.clock import SystemClock
from shoal.comm import messages as msg
from shoal.comm.link import Inbound
from shoal.events import EventLog, read_events
from shoal.membership import NOTHING, Origin, Standing, World
from shoal.training.coordinator import Coordinator
from shoal.training.generations import Generations
from shoal.versions.store import Store

PATIENCE = {"silent_s": 60.0, "disconnected_s": 60.0, "collective_s": 60.0, "stuck_s": 60.0, "gather_s": 60.0}
IDENTITY = {"shoal": "1", "torch": "2", "job_hash": "3"}
RECORD = {
    "job": {"patience": PATIENCE, "num_lanes": 4},
    "min_workers": 1, "max_workers": 4, "workers": 1, "total_steps": 100, "identity": IDENTITY,
}  # fmt: skip


class Hands(SystemClock):
    """A clock that stands still until it is turned."""

    now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s


class Wire:
    """A listener on which ``said`` comes one by one; then an ``end`` that stops the coordinator. Keeps what is sent.

    A number among what is said is a silence of so many seconds.
    """

    num_refused = 0

    def __init__(self, *said: tuple[str, Any] | float) -> None:
        self.said = deque(said)
        self.sent: list[tuple[str, Any]] = []
        self.clock = Hands()

    def receive(self, timeout_s: float) -> tuple[list[Inbound[Any]], list[str]]:
        if not self.said:
            raise EOFError
        heard = self.said.popleft()
        if isinstance(heard, float):
            self.clock.now_s += heard
            return [], []
        return [Inbound(*heard)], []

    def send(self, peer: str, message: Any) -> None:
        self.sent.append((peer, message))

    def to(self, peer: str, kind: type) -> list[Any]:
        return [message for name, message in self.sent if name == peer and isinstance(message, kind)]


def hello(name: str) -> tuple[str, msg.Hello]:
    identity = msg.Identity(**IDENTITY, host="h", pid=1, transfer_address="h:1")
    return name, msg.Hello(identity=identity)


def attach(name: str, generation: int) -> tuple[str, msg.Attach]:
    identity = msg.Identity(**IDENTITY, host="h", pid=1, transfer_address="h:1")
    standing = Standing(7, "f")
    return name, msg.Attach(identity=identity, generation=generation, standing=standing, halted=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


@pytest.fixture
def coordinate(store: Store, tmp_path: Path):
    def coordinator(wire: Wire, **job: Any) -> Coordinator:
        log = EventLog(tmp_path / "events.jsonl")
        record = {**RECORD, "job": {**RECORD["job"], **job}}
        return Coordinator(wire, Generations(store), log, record, wire.clock)  # type: ignore[arg-type]

    return coordinator


def world(generation: int, *members: str) -> World:
    lanes = {member: tuple(range(i, 4, len(members))) for i, member in enumerate(members)}
    return World(generation, members, lanes, Standing(0), Origin.SEED)


def all_heard(coordinator: Coordinator) -> None:
    with pytest.raises(EOFError):
        coordinator.serve()


def test_a_version_of_which_no_one_told_is_gone_on_from(store, coordinate):
    wire = Wire(hello("w0"))
    coordinator = coordinate(wire)
    store.put("versions/0000000005/manifest.json", msgspec.json.encode({"fingerprint": "abc"}))
    all_heard(coordinator)
    (entered,) = wire.to("w0", msg.Enter)
    assert (entered.world.base, entered.world.origin) == (Standing(5, "abc"), Origin.STORE)


def test_a_coordinator_whose_next_generation_is_taken_ends_and_says_so(store, coordinate):
    wire = Wire(hello("w0"))
    coordinator = coordinate(wire)
    Generations(store).record(world(1, "other"))
    assert coordinator.serve().outcome == "replaced"
    assert not wire.to("w0", msg.Enter)
    assert [ended.outcome for ended in wire.to("w0", msg.Ended)] == ["replaced"]


def test_a_replacement_learns_from_the_driver_that_the_run_is_to_stop(store, coordinate):
    Generations(store).record(world(1, "w0"))
    wire = Wire(attach("w0", 1), ("driver", msg.Watch(target=1, stopping=True)))
    coordinator = coordinate(wire)
    coordinator.take_over()
    all_heard(coordinator)
    assert wire.to("w0", msg.Conclude)
    assert wire.to("driver", msg.Wanted)[-1].stopping


def test_a_replacement_learns_from_the_driver_how_many_workers_there_are_to_be(store, coordinate):
    Generations(store).record(world(1, "w0"))
    wire = Wire(attach("w0", 1), ("driver", msg.Watch(target=3, stopping=False)))
    coordinator = coordinate(wire)
    coordinator.take_over()
    all_heard(coordinator)
    assert wire.to("driver", msg.Wanted)[-1].target == 3


@pytest.mark.parametrize(("on", "most"), [("local", 2), ("hosts", 4), (None, 4)])
def test_a_machine_has_no_more_workers_than_gpus_for_them(store, tmp_path, on, most):
    record = {**RECORD, "num_gpus": 2, **({"on": on} if on else {})}
    wire = Wire(*(("driver", msg.Scale(target=target)) for target in (most, most + 1)))
    all_heard(Coordinator(wire, Generations(store), EventLog(tmp_path / "log"), record, wire.clock))  # type: ignore[arg-type]
    first, second = wire.to("driver", msg.Answer)
    assert first.ok
    assert second.reason == f"this run takes 1 to {most} workers"


def test_who_was_let_go_hears_so_again_and_is_not_expelled(store, coordinate, tmp_path):
    beat = msg.Beat(generation=1, step=0, stable_step=0, phase="rest", phase_s=0.0)
    report = msg.Report(generation=1, standing=NOTHING)
    wire = Wire(hello("w0"), ("w0", msg.Leave()), ("w0", report), ("w0", beat), attach("w0", 1))
    all_heard(coordinate(wire))
    assert {dismissed.expelled for dismissed in wire.to("w0", msg.Dismissed)} == {False}
    kinds = [event["kind"] for event in read_events(tmp_path / "events.jsonl")[0]]
    assert kinds.count("dismissed") == 1


# Where the time goes, and lanes that move because of it


BALANCE = {"kind": "Balance", "enabled": True, "least_gain": 0.1, "settle_s": 1.5}
WIDE = {"num_lanes": 64, "balance": BALANCE}


def beat(name: str, step: int, generation: int = 1, **figures: float) -> tuple[str, msg.Beat]:
    """A heartbeat with what a step costs."""
    told = {"samples": 32.0, "compute_s": 0.1, "step_s": 0.4 + step / 1e6, "sent_bytes": 5e6, **figures}
    return name, msg.Beat(
        generation=generation, step=step, stable_step=step, phase="compute", phase_s=0.0, figures=told
    )


def trained(steps: range, **slow: float) -> list[tuple[str, Any] | float]:
    """Two workers that tell of so many steps, half a second each."""
    start = [hello("w0"), ("driver", msg.Scale(target=2)), hello("w1"), *(report(w) for w in ("w0", "w1"))]
    beats = [said for step in steps for said in (0.5, beat("w0", step, 2), beat("w1", step, 2, **slow))]
    return [*start, ("w1", msg.Caught(generation=2, step=0)), ("w0", msg.Taken(generation=2, number=1, step=0)), *beats]


def report(name: str) -> tuple[str, msg.Report]:
    standing = Standing(0, "f") if name == "w0" else NOTHING
    return name, msg.Report(generation=1, standing=standing)


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(path / "events.jsonl")[0] if event["kind"] == kind]


def test_lanes_of_a_worker_that_computes_slowly_go_to_the_other(coordinate, tmp_path):
    wire = Wire(*trained(range(1, 6), compute_s=0.3))
    all_heard(coordinate(wire, **WIDE))
    healed, balanced = events(tmp_path, "deal")
    assert (healed["reason"], healed["lanes"]) == ("healed", {"w0": 32, "w1": 32})
    assert (balanced["reason"], balanced["lanes"]) == ("balance", {"w0": 48, "w1": 16})
    assert len(wire.to("w0", msg.Deal)[-1].lanes["w1"]) == 16


@pytest.mark.parametrize("balance", [{**BALANCE, "enabled": False}, None])
def test_no_lanes_move_when_that_is_turned_off_or_the_record_is_older_than_that(coordinate, tmp_path, balance):
    all_heard(coordinate(Wire(*trained(range(1, 30), compute_s=0.3)), num_lanes=64, balance=balance))
    assert [deal["reason"] for deal in events(tmp_path, "deal")] == ["healed"]


def test_heartbeats_between_two_commits_are_no_new_measure(coordinate, tmp_path):
    all_heard(coordinate(Wire(*trained(range(1, 3), compute_s=0.3), *[0.5] * 60), **WIDE))
    assert [deal["reason"] for deal in events(tmp_path, "deal")] == ["healed"]


def test_commits_without_new_figures_are_no_new_measure(coordinate, tmp_path):
    all_heard(coordinate(Wire(*trained(range(1, 30), compute_s=0.3, step_s=0.4)), **WIDE))
    assert [deal["reason"] for deal in events(tmp_path, "deal")] == ["healed"]


def test_a_run_that_is_to_stop_is_not_dealt_anew(coordinate, tmp_path):
    said = trained(range(1, 10), compute_s=0.3)
    all_heard(coordinate(Wire(*said[:7], ("driver", msg.Stop(reason="enough")), *said[7:]), **WIDE))
    assert "balance" not in [deal["reason"] for deal in events(tmp_path, "deal")]


def test_where_the_time_goes_is_told_every_five_seconds_and_at_the_end(coordinate, tmp_path):
    strategy = {"kind": "AllReduce", "codec": {"kind": "Int8"}}
    failed = ("w0", msg.Failed(kind="Bug", reason="enough"))
    coordinate(Wire(*trained(range(1, 25)), failed), **WIDE, strategy=strategy).serve()
    told = events(tmp_path, "timing")
    assert [event["step"] for event in told] == [10, 20, 24]
    assert {(event["strategy"], event["codec"]) for event in told} == {("AllReduce", "Int8")}
    own = {"lanes": 32, "compute_s": 0.1, "step_s": 0.4 + 10 / 1e6, "sent_bytes": 5e6}
    assert told[0]["workers"] == {"w0": own, "w1": own}


def test_of_a_run_too_short_for_that_it_is_told_at_the_end(coordinate, tmp_path):
    done = msg.Done(generation=2, standing=Standing(100, "f"), stored=True)
    wire = Wire(*trained(range(1, 4)), ("w0", done), ("w1", done))
    assert coordinate(wire, **WIDE).serve().outcome == "done"
    assert [event["step"] for event in events(tmp_path, "timing")] == [100]


def test_a_status_tells_each_workers_lanes_and_where_its_time_goes(coordinate):
    coordinator = coordinate(Wire(*trained(range(1, 3))), **WIDE)
    all_heard(coordinator)
    worker = coordinator.status()["workers"][1]
    assert (worker["name"], worker["lanes"], worker["compute_s"], worker["sent_bytes"]) == ("w1", 32, 0.1, 5e6)
