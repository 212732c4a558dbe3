"""A run that was killed, stopped or damaged goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import shoal
from shoal.comm import messages as msg
from shoal.job.job import Balance
from shoal.launch.run import find_run
from shoal.launch.using import read_version
from shoal.strategies import Strategy
from shoal.training.commanding import command
from tests.runs import counting
from tests.runs.background import Background, in_background, who_outlives
from tests.runs.classing import Classify, adam, dropping, make_job

if not hasattr(os, "pidfd_open"):
    pytest.skip("processes are watched through Linux's pidfds", allow_module_level=True)

pytestmark = pytest.mark.cluster

QUIET = shoal.TrainOptions(quiet=True)
JOB = make_job(
    Classify(dropping, step_s=0.005),
    steps=60,
    optimizer=adam,
    storing=shoal.Storing(every_steps=10, every_s=None, keep_last=2),
    balance=Balance(enabled=False),
)
COUNTING = replace(counting.job, storing=shoal.Storing(every_steps=10, every_s=None))


@pytest.fixture(scope="module", name="final")
def _final(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The fingerprint of everything in the last version of a run that was never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_RUNS", str(tmp_path_factory.mktemp("uninterrupted")))
        yield fingerprint(shoal.train(JOB, workers=2, options=QUIET))


def fingerprint(run: shoal.Run) -> str:
    version = read_version(run)
    assert run.outcome == "done" and version.step == 60
    return str(version.meta["fingerprint"])


def started(job: shoal.Job) -> AbstractContextManager[Background]:
    return in_background(partial(shoal.train, job, workers=2, name="run", options=QUIET), "run")


@pytest.fixture(name="interrupted")
def _interrupted() -> Callable[..., Background]:
    """A run whose processes are all killed at a step."""

    def run_until(step: int, job: shoal.Job = JOB) -> Background:
        with started(job) as run:
            run.until_step(step)
            run.kill_everything()
        return run

    return run_until


def newest(path: Path) -> int:
    """The step of the newest version, 0 with none."""
    return max((int(manifest.parent.name) for manifest in path.glob("versions/*/manifest.json")), default=0)


def damage(path: Path, step: int) -> None:
    """Change one bit of a version's model."""
    file = next((path / "versions" / f"{step:010d}").glob("model*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("step", [3, 27, 44])
def test_killed_whole_at_any_step_it_ends_in_the_same_bits(interrupted, final, step):
    stored = newest(interrupted(step).path)
    run = shoal.resume("run", job=JOB, options=QUIET)
    assert [event["base_step"] for event in run.events if event["kind"] == "generation"] == [0, stored]
    assert fingerprint(run) == final


STRATEGIES: list[Strategy] = [
    shoal.AllReduce(codec=shoal.OneBit()),
    shoal.AllReduce(codec=shoal.PowerSGD()),
    shoal.DiLoCo(sync_every_steps=5, codec=shoal.Int4(), fragments=2, overlap_steps=2),
]
"""What a version must hold of them: residuals, a codec's state, an outer optimizer's, the workers' own."""


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_what_a_strategy_remembers_is_stored(interrupted, strategy, monkeypatch, tmp_path):
    job = replace(JOB, strategy=strategy)
    interrupted(27, job)
    resumed = shoal.resume("run", job=job, options=QUIET)
    assert resumed.events[0]["kind"] == "joined" and newest(resumed.path) == 60
    monkeypatch.setenv("SHOAL_RUNS", str(tmp_path / "uninterrupted"))
    assert fingerprint(shoal.train(job, workers=2, options=QUIET)) == fingerprint(resumed)


def test_killed_twice_it_ends_in_the_same_bits(interrupted, final):
    interrupted(15)
    with in_background(partial(shoal.resume, "run", job=JOB, options=QUIET), "run") as again:
        again.until_step(38)
        again.kill_everything()
    assert fingerprint(shoal.resume("run", job=JOB, options=QUIET)) == final


def test_with_other_workers_it_still_commits_each_sample_once(interrupted):
    interrupted(35, COUNTING)
    run = shoal.resume("run", workers=3, job=COUNTING, options=QUIET)
    assert counting.num_commits(shoal.load_model(run, job=COUNTING)).eq(1).all()
    assert run.record["workers"] == 3


def test_no_process_outlives_a_killed_driver():
    with started(JOB) as run:
        run.until_step(5)
        others = [pid for pid in run.processes() if pid != run.pid]
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert len(others) == 4, "a nursery, a coordinator, two workers"
        assert not who_outlives(others, timeout_s=10)


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stores_the_newest_step_and_nothing_is_lost(final, stop, code):
    with started(JOB) as run:
        run.until_step(13)
        os.kill(run.pid, stop)
        assert run.wait() == code
        assert not run.processes()
    stored = read_version("run").step
    assert stored >= 13
    resumed = shoal.resume("run", job=JOB, options=QUIET)
    steps = [event["step"] for event in resumed.events if event["kind"] == "progress"]
    assert steps == list(range(1, 61)), "no step was taken twice"
    assert fingerprint(resumed) == final


def test_a_stopped_run_resumes_to_the_same_bits(final):
    with started(JOB) as run:
        run.until_step(13)
        command(find_run("run"), msg.Stop(reason="it was asked to stop"))
        assert run.wait() == 0
    assert fingerprint(shoal.resume("run", job=JOB, options=QUIET)) == final


def test_a_damaged_version_is_refused_and_the_one_before_it_on_offer(interrupted, final):
    path = interrupted(44).path
    damaged = newest(path)
    damage(path, damaged)
    with pytest.raises(shoal.ConfigError, match=rf"{damaged}.*--from-step {damaged - 10}"):
        shoal.resume("run", job=JOB, options=QUIET)
    assert fingerprint(shoal.resume("run", from_step=damaged - 10, job=JOB, options=QUIET)) == final


def test_a_whole_version_is_not_passed_over(interrupted):
    stored = newest(interrupted(27).path)
    with pytest.raises(shoal.ConfigError, match=rf"newest good version is {stored}.* not 1"):
        shoal.resume("run", from_step=1, job=JOB, options=QUIET)


def test_one_run_has_one_driver():
    with started(JOB) as run:
        run.until_step(1)
        with pytest.raises(shoal.ConfigError, match="is under way"):
            shoal.resume("run", job=JOB, options=QUIET)


def test_a_run_that_is_done_stays_as_it_is(final):
    shoal.train(JOB, workers=2, name="run", options=QUIET)
    assert fingerprint(shoal.resume("run", job=JOB, options=QUIET)) == final
