"""Workers on the hosts that ``SHOAL_HOSTS`` names: where they start, and real runs on real hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import shoal
from shoal.errors import ConfigError, ShoalError
from shoal.events import Event, read_events
from shoal.lab import Lab
from shoal.launch.hosts import Host, Hosts, least_used, live_hosts

pytest_plugins = ["shoal.testing.lab"]

SHOAL = str(Path(sys.executable).with_name("shoal"))
JOB = Path(__file__).parents[1] / "runs" / "counting.py"
PATIENCE_S = 200.0
HOSTS = tuple(Host(name, f"10.0.0.{n}", ()) for n, name in enumerate("abc"))


def names(used: dict[str, int], live: str, count: int) -> str:
    """Where so many starts go, one after the other."""
    counts = Counter(used)
    for _ in range(count):
        counts[least_used(HOSTS, counts, live).name] += 1
    return "".join(sorted(counts.elements()))


def test_workers_start_on_the_hosts_in_turn():
    assert names({}, "abc", 3) == "abc"
    assert names({}, "abc", 5) == "aabbc"


def test_one_more_goes_to_the_least_used_live_host():
    assert names({"a": 1, "c": 1}, "abc", 1) == "abc"
    assert names({"a": 1, "c": 1}, "ac", 1) == "aac"


def test_where_no_host_answers_a_start_is_tried_nevertheless():
    assert names({"a": 1}, "", 1) == "ab"


def test_a_host_that_refuses_a_connection_is_there():
    assert live_hosts([Host("here", "127.0.0.1", ())]) == {"here"}


def test_a_file_of_hosts_is_read(tmp_path, monkeypatch):
    path = tmp_path / "hosts.json"
    path.write_text('{"driver": "10.0.0.9", "hosts": [{"name": "a", "address": "10.0.0.0", "exec": []}]}')
    monkeypatch.setenv("SHOAL_HOSTS", str(path))
    assert Hosts.of_environment() == Hosts("10.0.0.9", HOSTS[:1])


@pytest.mark.parametrize("text", [None, "", "[]", '{"driver": "x", "hosts": []}', '{"driver": "x", "hosts": ["a"]}'])
def test_a_file_that_names_no_hosts_is_refused(tmp_path, monkeypatch, text):
    path = tmp_path / "hosts.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("SHOAL_HOSTS", str(path))
    with pytest.raises(ConfigError, match=r"hosts\.json"):
        Hosts.of_environment()


def test_without_the_variable_it_says_who_sets_it(monkeypatch):
    monkeypatch.delenv("SHOAL_HOSTS", raising=False)
    with pytest.raises(ConfigError, match="shoal lab run"):
        Hosts.of_environment()


@pytest.fixture(name="named")
def _named(tmp_path, monkeypatch):
    """Hosts that are all this machine, by the words before a command on each."""

    def name(*words: str) -> None:
        hosts = [{"name": f"h{n}", "address": "127.0.0.1", "exec": each.split()} for n, each in enumerate(words)]
        (tmp_path / "hosts.json").write_text(json.dumps({"driver": "127.0.0.1", "hosts": hosts}))
        monkeypatch.setenv("SHOAL_HOSTS", str(tmp_path / "hosts.json"))
        monkeypatch.setenv("SHOAL_RUNS", str(tmp_path / "runs"))

    return name


def test_a_job_that_no_worker_could_run_is_refused_before_there_is_a_run(named, tmp_path, capfdbinary, monkeypatch):
    job = tmp_path / "job.py"
    job.write_text("print('loading'); job = 1 / 0")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    named("env")
    with pytest.raises(ConfigError, match=r"job\.py:1: ZeroDivisionError"):
        shoal.train(job, on="hosts", options=shoal.TrainOptions(quiet=True))
    assert b"loading" in capfdbinary.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_where_no_host_can_start_a_process_it_says_so_and_why(named, tmp_path, capfdbinary):
    named("cat /no/such/file", "echo hello there")
    with pytest.raises(ShoalError, match=r"was to load the job on h[01] has ended; its output above says why"):
        shoal.train(JOB, workers=2, on="hosts", options=shoal.TrainOptions(quiet=True))
    said = capfdbinary.readouterr().err
    assert b"cat: " in said and b"hello there" in said
    assert not (tmp_path / "runs").exists()


def test_words_that_cannot_be_run_are_told(named):
    named("/no/such/program")
    with pytest.raises(ConfigError, match=r"/no/such/program, with which SHOAL_HOSTS has h0 run commands: .*No such"):
        shoal.train(JOB, on="hosts", options=shoal.TrainOptions(quiet=True))


@contextmanager
def training(lab: Lab, folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """`shoal train` on this machine, with workers on the lab's hosts; killed at the end if it has not ended."""
    env = {"SHOAL_RUNS": str(folder), "COUNTING_SAMPLES": "4000", "COUNTING_STEP_S": "0.05", **lab.env}
    with (folder / "driver.log").open("ab") as log:
        command = [SHOAL, "train", str(JOB), "--name", "run", *words]
        driver = subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def wait_for(folder: Path, found: Callable[[list[Event]], bool]) -> list[Event]:
    """The run's events, once what is awaited is among them."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not found(events := read_events(folder / "run" / "events.jsonl")[0]):
        assert time.monotonic() < deadline_s, (folder / "driver.log").read_text()
        threading.Event().wait(0.05)
    return events


def places(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text().split()[1].rstrip(",") for path in (folder / "run" / "logs").glob("w*.log")}


@pytest.mark.cluster
def test_each_host_has_a_worker_and_every_sample_counts_once_though_one_host_dies(shoal_lab, tmp_path, monkeypatch):
    lab = shoal_lab(hosts=3, link="100mbit")
    with training(lab, tmp_path, "--workers", "2..3", "--set", "patience.collective_s=2") as driver:
        wait_for(tmp_path, lambda events: any(e["kind"] == "progress" and e["step"] >= 10 for e in events))
        assert places(tmp_path) == {"w0": "h0", "w1": "h1", "w2": "h2"}
        assert lab.kill(1) >= 2, "the worker, and the nursery that it came from"
        assert driver.wait(PATIENCE_S) == 0, (tmp_path / "driver.log").read_text()
    assert places(tmp_path).get("w3") == "h1", "nothing runs there, and it answers"
    assert sum(lab.bytes(2)) > 50_000
    monkeypatch.setenv("COUNTING_SAMPLES", "4000")
    counts = -shoal.load_model(tmp_path / "run").counts * 40
    assert counts.round(decimals=6).unique().tolist() == [1.0]


@pytest.mark.cluster
def test_a_driver_that_is_killed_leaves_no_worker_behind(shoal_lab, tmp_path):
    lab = shoal_lab(hosts=1)
    with training(lab, tmp_path):
        wait_for(tmp_path, lambda events: any(e["kind"] == "joined" for e in events))
    deadline_s = time.monotonic() + PATIENCE_S
    while lab.hosts[0].pids():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.05)


@pytest.mark.cluster
def test_rays_nodes_are_the_hosts(shoal_lab, tmp_path):
    pytest.importorskip("ray")
    ask = "import json, ray; ray.init(log_to_driver=False); nodes = ray.nodes()\n"
    ask += "print(json.dumps([node['NodeManagerAddress'] for node in nodes]))"
    command = [SHOAL, "lab", "run", "--hosts", "2", "--link", "100mbit", "--ray", "--"]
    ran = subprocess.run([*command, sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert sorted(address.rsplit(".", 1)[1] for address in found) == ["10", "11"]
