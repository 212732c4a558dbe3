"""A store that takes no version, or gives a wrong one back: training goes on, and no one uses what is damaged."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import shoal
from shoal.launch.using import read_version
from tests.runs.classing import Classify, make_job

pytestmark = pytest.mark.cluster

QUIET = shoal.TrainOptions(quiet=True)
STORING = shoal.Storing(every_steps=10, every_s=None)
STEP_S = 0.02


@dataclass(frozen=True)
class Meddling(Classify):
    """Something befalls the store before some of a worker's steps. For runs of one worker."""

    meddle: Any = None
    steps: Iterator[int] = field(default_factory=count)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.meddle(next(self.steps))
        return super().loss(model, batch)


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in shoal.Run(run).events if event["kind"] == kind]


def refuse_large_files_from(first: int, last: int) -> Any:
    """Between two steps this process can write no file of a version's size, as on a full disk."""

    def meddle(step: int) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        if step == last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    return meddle


def test_training_goes_on_while_the_store_takes_no_version_and_says_so():
    task = Meddling(step_s=STEP_S, meddle=refuse_large_files_from(19, 39))
    run = shoal.train(make_job(task, steps=50, storing=STORING), options=QUIET)
    failed = events_of(run.path, "store_failed")
    assert run.outcome == "done"
    assert [event["step"] for event in failed] == [20, 30]
    assert failed[0]["reason"].startswith("file too large: cannot write")
    assert [event["step"] for event in events_of(run.path, "stored")] == [10, 40, 50]


def test_a_run_whose_last_version_cannot_be_stored_fails_and_keeps_the_one_before():
    task = Meddling(step_s=STEP_S, meddle=refuse_large_files_from(19, -1))
    job = make_job(task, steps=30, storing=STORING)
    with pytest.raises(shoal.ShoalError, match=r"step 30 could not be stored.*newest stored version is of step 10"):
        shoal.train(job, name="run", options=QUIET)
    assert read_version("run").step == 10
    resumed = shoal.resume("run", job=make_job(Classify(), steps=30, storing=STORING), options=QUIET)
    assert resumed.outcome == "done" and read_version(resumed).step == 30


def test_training_goes_on_over_a_full_disk_and_the_last_good_version_stays(small_disk):
    disk = small_disk("256k")
    filler = disk / "filler"

    def meddle(step: int) -> None:
        if step == 19:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if step == 25:
            assert read_version("run").step == 10
        if step == 39:
            filler.unlink()

    job = make_job(Meddling(step_s=STEP_S, meddle=meddle), steps=50, storing=STORING)
    options = shoal.TrainOptions(store=str(disk), quiet=True)
    run = shoal.train(job, name="run", options=options)
    assert run.outcome == "done"
    failed = events_of(run.path, "store_failed")
    assert [event["step"] for event in failed] == [20, 30]
    assert failed[0]["reason"].startswith("no space left on device: cannot write")
    assert read_version(run).step == 50


def test_a_version_with_a_wrong_checksum_is_refused_and_the_one_before_it_offered(command, job_file):
    settings = ["--set", "storing.every_steps=10"]
    assert command("train", job_file(), "--name", "run", "--quiet", *settings).code == 0
    newest = max(shoal.Run(Path(os.environ["SHOAL_RUNS"]) / "run").path.glob("versions/*"))
    model = next(newest.glob("model*.safetensors"))
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    answer = command("eval", "run")
    assert answer.code == 1
    assert "sha256" in answer.err and "10" in answer.err
    assert command("eval", "run", "--version", "10", "--json").value["rmse"] > 0
