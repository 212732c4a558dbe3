from __future__ import annotations

import importlib
import sys

import pytest

from shoal.errors import ConfigError
from shoal.job import Job, describe, files_of, hash_job, load_job, override, parse_settings

JOB = """
import numpy as np
import torch
import shoal

class Fit:
    def model(self):
        return torch.nn.Linear(2, 1)
    def loss(self, model, batch):
        return model(batch[0]).square().mean()
    def metrics(self, model, batch):
        return {}

data = shoal.Arrays(np.zeros((8, 2), np.float32))
job = shoal.Job(task=Fit(), train=data, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), global_batch=4, epochs=1)
"""


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shoal_job", raising=False)


@pytest.fixture(name="write")
def _write(tmp_path):
    def write(text, name="job.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture(name="job")
def _job(write):
    return load_job(write(JOB))


# Files


def test_a_job_file_gives_its_job(job):
    assert isinstance(job, Job) and job.global_batch == 4 and type(job.task).__module__ == "shoal_job"


def test_a_single_job_may_bear_any_name(write):
    assert load_job(write(JOB.replace("job = shoal", "mine = shoal"))).epochs == 1


def test_of_several_jobs_the_one_named_job_is_meant(write):
    other = JOB.replace("job = shoal", "other = shoal").replace("epochs=1", "epochs=2")
    assert load_job(write(JOB + other)).epochs == 1


def test_a_job_file_may_import_its_neighbours(write):
    write("EPOCHS = 3\n", "my_neighbour_settings.py")
    path = write("from my_neighbour_settings import EPOCHS\n" + JOB.replace("epochs=1", "epochs=EPOCHS"))
    assert load_job(path).epochs == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import a_module_that_is_not_there\n", r"job\.py:1: ModuleNotFoundError"),
        ("x = 1\ny = (\n", r"job\.py:2: SyntaxError"),
        ("\n\n1 / 0\n", r"job\.py:3: ZeroDivisionError"),
        (JOB.replace("global_batch=4", "global_batch=0"), r"job\.py:15: global_batch must be greater than 0, not 0"),
        (JOB.replace("task=Fit()", "task=3"), r"must have the methods model, loss and metrics; int lacks"),
        (JOB.replace(", epochs=1", ""), "either epochs or steps"),
        ("x = 1\n", "it defines none"),
        (JOB.replace("job = s", "one = s") + JOB.replace("job = s", "two = s"), "it defines one, two"),
    ],
)
def test_a_file_that_is_no_job_says_what_is_wrong_and_where(write, text, says):
    with pytest.raises(ConfigError, match=says):
        load_job(write(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.py does not exist"):
        load_job(tmp_path / "nowhere.py")


def test_the_revision_changes_with_the_file_and_with_its_neighbours_and_nothing_else(write):
    write("EPOCHS = 3\n", "another_neighbour.py")
    path = write("import another_neighbour\n" + JOB)
    load_job(path)
    before = hash_job(path)
    write("unrelated = True\n", "never_imported.py")
    assert hash_job(path) == before
    write("EPOCHS = 4\n", "another_neighbour.py")
    changed = hash_job(path)
    write("import another_neighbour\n" + JOB + "\n")
    assert len({before, changed, hash_job(path)}) == 3


def test_the_revision_is_the_same_in_another_folder(write, tmp_path):
    path = write(JOB)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "job.py").write_text(JOB)
    assert hash_job(path) == hash_job(tmp_path / "copy" / "job.py")


def test_the_code_is_what_is_imported_whatever_else_the_process_has_loaded(write, tmp_path, monkeypatch):
    write("", "loaded_beside.py")
    for name in ("parts/__init__.py", "parts/deep/inner.py", "parts/deep/other.py", "parts/late.py", "parts/unused.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "parts" / "deep" / "inner.py").write_text("from . import other\nfrom .. import missing\n")
    (tmp_path / "parts" / "late.py").write_text("import no_such_module, torch\nfrom shoal import job\n")
    path = write("from parts.deep import inner\n" + JOB + "\ndef later():\n    from parts import late\n")
    names = ["job.py", "parts/__init__.py", "parts/deep/inner.py", "parts/deep/other.py", "parts/late.py"]
    assert [file.relative_to(tmp_path).as_posix() for file in files_of(path)] == names
    before = hash_job(path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "loaded_beside", importlib.import_module("loaded_beside"))
    assert hash_job(path) == before


# Settings


def test_settings_are_fields_and_values():
    assert parse_settings(["a=1", " b.c = x=y "]) == {"a": "1", "b.c": "x=y"}


@pytest.mark.parametrize("text", ["a", "=1", ""])
def test_a_setting_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="FIELD=VALUE"):
        parse_settings([text])


def test_fields_are_replaced_by_name_at_any_depth(job):
    changed = override(
        job, {"global_batch": "8", "strategy.bucket_bytes": "2048", "storing.every_s": "none", "precision": "bf16"}
    )
    assert (changed.global_batch, changed.strategy.bucket_bytes) == (8, 2048)
    assert changed.storing.every_s is None and changed.precision == "bf16" and job.global_batch == 4


def test_asking_for_steps_unsets_epochs(job):
    changed = override(job, {"steps": "10"})
    assert changed.steps == 10 and changed.epochs is None


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("global_bach", "8", "did you mean global_batch"),
        ("strategy.bucket_byte", "8", r"did you mean strategy\.bucket_bytes"),
        ("zzz", "8", "there are task, train"),
        ("global_batch", "many", "global_batch=many"),
        ("global_batch", "1.5", r"global_batch=1\.5"),
        ("global_batch", "none", "global_batch=none"),
        ("global_batch", "-1", "greater than 0"),
        ("clip_norm", "nan", "greater than 0"),
        ("precision", "fp8", "precision"),
        ("optimizer", "adam", "set it in the job file"),
        ("storing", "often", "set it in the job file"),
        ("task.lr", "1", "task has no fields to set"),
        ("seed.deep.er", "1", "seed has no fields to set"),
        ("strategy.bucket_bytes", "1", "at least 1024"),
    ],
)
def test_a_setting_that_cannot_be_meant_says_why(job, name, value, says):
    with pytest.raises(ConfigError, match=says):
        override(job, {name: value})


@pytest.mark.parametrize("names", [("storing", "storing.every_s"), ("storing.every_s", "storing")])
def test_a_part_cannot_be_set_as_a_whole_and_by_its_fields(job, names):
    with pytest.raises(ConfigError, match="storing"):
        override(job, dict.fromkeys(names, "1"))


def test_a_job_is_described_with_where_each_value_came_from(job):
    settings = {"global_batch": "8"}
    described = describe(override(job, settings), settings)
    assert described["global_batch"] == 8 and described["strategy"]["kind"] == "AllReduce"
    assert described["from"]["global_batch"] == "flag" and described["from"]["seed"] == "default"
    assert "epochs" not in described["from"], "the file decided it"
