"""Who may not take part is told why, and the run does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import shoal
from shoal.comm.keys import JobKey
from shoal.launch.manual import join
from shoal.launch.run import find_run
from tests.runs.background import Background, in_background

pytestmark = pytest.mark.cluster


@pytest.fixture(name="waiting")
def _waiting(job_file: Callable[..., Path]) -> Iterator[Background]:
    """A run that waits for a worker to be started by hand."""
    path = job_file()
    call = partial(shoal.train, path, on="manual", name="run", options=shoal.TrainOptions(quiet=True))
    with in_background(call, "run") as run:
        run.until_listening()
        yield run


def join_as(name: str, path: Path, key: Path | None = None) -> Callable[[], int]:
    folder = find_run("run")
    return partial(join, path, folder.read_control().address, key or folder.key_path, name, None)


def refusal(run: Background) -> str:
    return str(run.until("refused")["reason"])


def test_a_worker_with_another_jobs_key_gets_no_answer(command, waiting, job_file, tmp_path):
    JobKey.make().write(tmp_path / "other.key")
    address = find_run("run").read_control().address
    answer = command("worker", job_file(), "--join", address, "--key", tmp_path / "other.key")
    assert answer.code == 1
    assert f"the coordinator at {address} did not answer" in answer.err and "is the key its?" in answer.err
    assert command("status", "run", "--json").value["strangers_refused"] >= 1


def test_a_worker_without_a_key_is_told_where_to_copy_it_from(command, job_file, tmp_path):
    answer = command("worker", job_file(), "--join", "127.0.0.1:1", "--key", tmp_path / "no.key")
    assert answer.code == 2 and "copy it from RUN/key" in answer.err


def test_a_worker_with_another_revision_of_the_job_is_refused(waiting, job_file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    changed = tmp_path / "elsewhere" / "job.py"
    changed.write_text(job_file().read_text() + "\n")
    with in_background(join_as("other", changed), "run") as worker:
        assert worker.wait() == 1
    assert "it runs job code" in refusal(waiting) and "install the same revision" in refusal(waiting)


def test_a_worker_with_another_torch_is_refused_and_the_run_goes_on(waiting, job_file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0.0")
        with in_background(join_as("other", job_file()), "run") as stranger:
            assert stranger.wait() == 1
    assert "it runs torch 1.0.0 instead of" in refusal(waiting)
    with in_background(join_as("own", job_file()), "run") as worker:
        assert worker.wait() == 0
    assert waiting.wait() == 0
    assert [event["members"] for event in waiting.events if event["kind"] == "generation"] == [["own"]]
