"""Workers as actors of a real Ray cluster, with and without tokens; a worker and then a node killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import shoal
from shoal.comm.keys import JobKey
from shoal.events import Event, read_events
from shoal.launch.code import Code
from shoal.launch.posting import Posting
from shoal.launch.ray import RayWorker
from tests.cluster import nodes

SHOAL = str(Path(sys.executable).with_name("shoal"))
TABLED = Path(__file__).parents[1] / "runs" / "tabled.py"
TABLED_SAMPLES = "1280"
COUNTING = Path(__file__).parents[1] / "runs" / "counting.py"
PATIENCE_S = 180.0
TOKEN = "t" * 48

pytestmark = pytest.mark.cluster


@dataclass
class Training:
    """A run under way on the cluster's head, started by the command line."""

    cluster: nodes.Cluster
    process: subprocess.Popen[bytes]
    runs: Path
    output: Path

    @property
    def events(self) -> list[Event]:
        return read_events(self.runs / "run" / "events.jsonl")[0]

    def first(self, fits: Callable[[Event], bool]) -> Event:
        """The first event that fits, as soon as there is one."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            if found := [event for event in self.events if fits(event)]:
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"it did not happen: {self.output.read_text()}")

    def step(self, number: int) -> Event:
        return self.first(lambda e: e["kind"] == "progress" and e["step"] >= number)

    def healed_after(self, at_s: float) -> Event:
        return self.first(lambda e: e["kind"] == "healed" and e["at_s"] > at_s)

    def end(self) -> str:
        """Wait for the end; what was printed."""
        self.process.wait(PATIENCE_S)
        return self.output.read_text()


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of two files, which counts how often each sample was committed."""
    monkeypatch.delitem(sys.modules, "counted", raising=False)
    folder = tmp_path / "job"
    folder.mkdir()
    shutil.copy(COUNTING, folder / "counted.py")
    (folder / "job.py").write_text("from counted import job\n")
    return folder / "job.py"


def train(cluster: nodes.Cluster, job: Path, folder: Path, *options: str, **env: str) -> Training:
    command = [SHOAL, "train", str(job), "--on", "ray", "--name", "run", *options]
    output = folder / "output.txt"
    given = {"RAY_ADDRESS": cluster.address, "SHOAL_RUNS": str(folder / "runs"), **env}
    return Training(cluster, cluster.head.spawn(command, output, given), folder / "runs", output)


@pytest.fixture(scope="module")
def ray() -> None:
    if find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'shoal[ray]'")


@pytest.fixture(scope="module")
def hosts(ray: None) -> None:
    if reason := nodes.why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def with_tokens(hosts: None) -> Iterator[nodes.Cluster]:
    samples = {"COUNTING_SAMPLES": "6000", "COUNTING_STEP_S": "0.3", "TABLED_SAMPLES": TABLED_SAMPLES}
    with nodes.cluster({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **samples}) as made:
        made.add(num_cpus=3)
        yield made


@pytest.fixture
def without_tokens(hosts: None) -> Iterator[nodes.Cluster]:
    with nodes.cluster({"RAY_AUTH_MODE": "disabled"}) as made:
        made.add(num_cpus=1)
        yield made


def test_a_wrong_token_is_refused_in_words(with_tokens: nodes.Cluster, job: Path, tmp_path: Path) -> None:
    training = train(with_tokens, job, tmp_path, RAY_AUTH_TOKEN="w" * 48)
    output = training.end()
    assert training.process.returncode == 2
    assert "did not admit us" in output and "RAY_AUTH_TOKEN" in output
    assert "Traceback" not in output


def test_a_killed_worker_and_a_killed_node_lose_no_sample(
    with_tokens: nodes.Cluster, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = with_tokens.add(num_cpus=2, hidden=job.parent)
    training = train(with_tokens, job, tmp_path, "--workers", "3")
    training.step(10)
    joined = [event for event in training.events if event["kind"] == "joined"]
    assert {event["host"] for event in joined} == {node.address for node in with_tokens.nodes}

    killed_at_s = time.time()
    os.kill(next(e["pid"] for e in joined if e["host"] != second.address), signal.SIGKILL)
    worker_back_s = training.healed_after(killed_at_s)["at_s"] - killed_at_s
    killed_at_s = time.time()
    second.kill()
    node_back_s = training.healed_after(killed_at_s)["at_s"] - killed_at_s
    output = training.end()
    print(f"a worker was replaced after {worker_back_s:.1f} s, a node's after {node_back_s:.1f} s")

    monkeypatch.setenv("COUNTING_SAMPLES", "6000")
    found = shoal.account(training.runs / "run")
    assert training.process.returncode == 0, output
    assert (found.taken, found.lost, found.repeated) == (6000, 0, 0)
    counts = -40 * shoal.load_model(training.runs / "run").counts
    assert counts.min().item() == pytest.approx(1.0)
    assert counts.max().item() == pytest.approx(1.0)
    assert output.count("nodes must share") == 1


def test_shards_serve_workers_on_all_nodes(
    with_tokens: nodes.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_tokens.add(num_cpus=2)
    training = train(with_tokens, TABLED, tmp_path, "--workers", "4")
    output = training.end()
    assert training.process.returncode == 0, output
    monkeypatch.setenv("TABLED_SAMPLES", TABLED_SAMPLES)
    counts = -32 * shoal.load_model(training.runs / "run").counts(torch.arange(int(TABLED_SAMPLES)))
    assert torch.equal(counts, torch.ones(int(TABLED_SAMPLES), 1))
    joined = [event for event in training.events if event["kind"] == "joined"]
    assert {event["host"] for event in joined} == {with_tokens.head.address, other.address}


def test_without_tokens_a_worker_too_many_waits_for_a_cpu(
    without_tokens: nodes.Cluster, job: Path, tmp_path: Path
) -> None:
    slow = ("--set", "patience.gather_s=15")
    training = train(without_tokens, job, tmp_path, "--workers", "1..2", *slow)
    output = training.end()
    assert training.process.returncode == 0, output
    assert output.count("must wait until the Ray cluster has a free CPU; it has 1 in all") == 1
    assert shoal.account(training.runs / "run").lost == 0


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:9", "no Ray cluster answers"), ("local", "must be HOST:PORT"), ("ray://there:10001", "HOST:PORT")],
)
def test_no_cluster_is_told_and_none_is_started(ray: None, address: str, said: str, job: Path, tmp_path: Path) -> None:
    env = {**os.environ, "RAY_ADDRESS": address, "SHOAL_RUNS": str(tmp_path / "runs")}
    ran = subprocess.run(
        [SHOAL, "train", str(job), "--on", "ray"], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert said in ran.stderr


def test_on_a_node_without_the_data_a_relative_path_fails_in_words(ray: None, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "job.py").write_text("rows = open('rows.csv')\n")
    code = Code.of(away / "job.py", [str(away / "job.py")])
    shutil.rmtree(away)
    key, version = JobKey.make(), str(torch.__version__)
    posting = Posting(name="w0", address="", key=key, store="", folder=None, settings=(), torch=version)
    exit_code, last_words = RayWorker().run(code, posting)
    assert exit_code == 2
    assert "'rows.csv'" in last_words and "absolute paths or URLs" in last_words
