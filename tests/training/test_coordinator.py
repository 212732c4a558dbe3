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


class Wire:
    """A listener on which ``said`` comes one by one; then an ``end`` that stops the coordinator. Keeps what is sent."""

    num_refused = 0

    def __init__(self, *said: tuple[str, Any]) -> None:
        self.said = deque(said)
        self.sent: list[tuple[str, Any]] = []

    def receive(self, timeout_s: float) -> tuple[list[Inbound[Any]], list[str]]:
        if not self.said:
            raise EOFError
        return [Inbound(*self.said.popleft())], []

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
    def coordinator(wire: Wire) -> Coordinator:
        log = EventLog(tmp_path / "events.jsonl")
        return Coordinator(wire, Generations(store), log, RECORD, SystemClock())  # type: ignore[arg-type]

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


def test_who_was_let_go_hears_so_again_and_is_not_expelled(store, coordinate, tmp_path):
    beat = msg.Beat(generation=1, step=0, stable_step=0, phase="rest", phase_s=0.0)
    report = msg.Report(generation=1, standing=NOTHING)
    wire = Wire(hello("w0"), ("w0", msg.Leave()), ("w0", report), ("w0", beat), attach("w0", 1))
    all_heard(coordinate(wire))
    assert {dismissed.expelled for dismissed in wire.to("w0", msg.Dismissed)} == {False}
    kinds = [event["kind"] for event in read_events(tmp_path / "events.jsonl")[0]]
    assert kinds.count("dismissed") == 1
