"""Workers started by hand on hosts of their own; the link between two of them is cut."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.events import Event, read_events
from tests.cluster import nodes

SHOAL = str(Path(sys.executable).with_name("shoal"))
JOB = Path(__file__).parents[1] / "runs" / "counting.py"
ENV = {"COUNTING_SAMPLES": "8000", "COUNTING_STEP_S": "0.02"}
PATIENCE_S = 120.0

pytestmark = pytest.mark.cluster


@pytest.fixture
def hosts() -> Iterator[nodes.Cluster]:
    if reason := nodes.why_not():
        pytest.skip(reason)
    with nodes.cluster(ENV) as cluster:
        for _ in range(4):
            cluster.add_host()
        yield cluster


def wait_for(run: Path, found: Any) -> list[Event]:
    """The run's events, once ``found`` says that what is awaited is among them."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        events, _ = read_events(run / "events.jsonl")
        if found(events):
            return events
        time.sleep(0.05)
    raise AssertionError(f"not within {PATIENCE_S:g} s: {[e for e in events if e['kind'] != 'progress']}")


def kinds(events: list[Event]) -> list[str]:
    return [event["kind"] for event in events]


def start(hosts: nodes.Cluster, folder: Path) -> Path:
    """A run on the first host, and a worker on each of the others; the run's folder."""
    address = f"{hosts.head.address}:7777"
    options = f"--on manual --workers 2..3 --listen {address} --name cut --set patience.collective_s=2".split()
    env = {"SHOAL_RUNS": str(folder)}
    hosts.children.append(hosts.head.spawn([SHOAL, "train", str(JOB), *options], folder / "driver.log", env))
    run = folder / "cut"
    deadline_s = time.monotonic() + PATIENCE_S
    while not (run / "control.json").exists():
        assert time.monotonic() < deadline_s, (folder / "driver.log").read_text()
        time.sleep(0.05)
    for number, host in enumerate(hosts.nodes[1:]):
        join = [SHOAL, "worker", str(JOB), "--join", address, "--key", str(run / "key"), "--name", f"hand{number}"]
        hosts.children.append(host.spawn(join, folder / f"hand{number}.log", {}))
    return run


def test_two_workers_that_cannot_reach_each_other_stop_nobody_else(hosts, tmp_path, monkeypatch):
    run = start(hosts, tmp_path)
    wait_for(run, lambda events: any(e["kind"] == "progress" and e["step"] >= 20 for e in events))
    hosts.part(hosts.nodes[1], hosts.nodes[2])
    events = wait_for(run, lambda events: "ended" in kinds(events))
    assert "stalled" in kinds(events)
    assert [e["reason"] for e in events if e["kind"] == "dismissed"] == ["it cannot reach the other workers"]
    assert [e["outcome"] for e in events if e["kind"] == "ended"] == ["done"]
    for name, value in ENV.items():
        monkeypatch.setitem(os.environ, name, value)
    counts = -shoal.load_model(run).counts * 40
    assert counts.round(decimals=6).unique().tolist() == [1.0]
