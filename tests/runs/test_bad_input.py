"""What cannot be what was meant is refused before anything starts: exit code 2, and what to do about it.

A process that loads a job takes seconds to start, so most jobs are tried here in this one, as that process does.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shoal
from shoal.launch.rehearsal import about, prepared
from shoal.launch.run import list_runs, runs_folder

DILOCO = "strategy=shoal.DiLoCo(sync_every_steps=4, codec=shoal.Int8())"
BROKEN_JOBS = {
    "does not import": ({"import torch\n": "import torch\nimport nothing_of_the_kind\n"}, r"job\.py:6: ModuleNotFound"),
    "is no Python": ({"class Line:": "class Line"}, r"job\.py:15: SyntaxError"),
    "defines no job": (
        {"job = shoal.Job": "work = print; dict"},
        "must define one shoal.Job named job; it defines none",
    ),
    "has no optimizer": (
        {"    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),\n": ""},
        r"job\.py:26: TypeError: .*'optimizer'",
    ),
    "has a field that there is not": ({"global_batch=8": "globl_batch=8"}, r"job\.py:26: TypeError: .*'globl_batch'"),
    "has a task without metrics": ({"def metrics": "def figures"}, "Line lacks metrics"),
    "has neither epochs nor steps": ({"    epochs=2,\n": ""}, "either epochs or steps"),
    "has an impossible value": ({"global_batch=8": "global_batch=0"}, "global_batch must be greater than 0, not 0"),
    "has data of two lengths": ({"x.sum(1, keepdim=True)": "x.sum(1)[:9]"}, "arrays must have one length"),
    "has data that do not fit the model": (
        {"nn.Linear(4, 1)": "nn.Linear(3, 1)"},
        r"task\.loss.*shapes",
    ),
    "has test data that do not fit": (
        {"test=points": "test=shoal.Arrays(x[:, :2], x)"},
        r"task\.metrics on 2 test",
    ),
    "has a loss a sample": (
        {"batch[1])\n\n    def m": 'batch[1], reduction="none")\n\n    def m'},
        "as a scalar tensor",
    ),
    "has a loss without gradient": ({"mse_loss(model(batch[0])": "mse_loss(batch[1]"}, "it has no gradient"),
    "sends more entries than there are": (
        {"global_batch=8": "strategy=shoal.AllReduce(codec=shoal.TopK(99)), global_batch=8"},
        r"TopK\(k=99.*5",
    ),
    "has a strategy that cannot use its codec": (
        {"global_batch=8": "strategy=shoal.AllReduce(codec=shoal.PowerSGD(), delay=1), global_batch=8"},
        "use delay=0 or another codec",
    ),
    "has a codec that does not take its numbers": (
        {"nn.Linear(4, 1)": "nn.Linear(4, 1).double()", "global_batch=8": DILOCO + ", global_batch=8"},
        "float64",
    ),
    "wants a device that is not there": ({"epochs=2": 'device="cuda", epochs=2'}, "this machine has none"),
}


def tried(path: Path, *settings: str) -> str:
    """What is said against a job that is loaded and rehearsed."""
    with pytest.raises(shoal.ConfigError) as refused:
        about(*prepared(path, settings))
    assert refused.value.exit_code == 2
    return str(refused.value)


@pytest.mark.parametrize(("replaced", "reason"), BROKEN_JOBS.values(), ids=BROKEN_JOBS.keys())
def test_a_job_is_refused_that(job_file, replaced, reason):
    assert re.search(reason, tried(job_file(replaced)))


@pytest.mark.parametrize("broken", ["does not import", "has data that do not fit the model"])
def test_the_command_tells_of_a_job_in_one_line_and_makes_no_run(command, job_file, broken):
    replaced, reason = BROKEN_JOBS[broken]
    answer = command("train", job_file(replaced))
    assert answer.code == 2
    assert re.fullmatch(f"error: .*{reason}.*\n", answer.err)
    assert not list_runs()


SETTINGS = {
    "globl_batch=4": "no field globl_batch; did you mean global_batch?",
    "storing.keep_lst=4": "no field storing.keep_lst; did you mean storing.keep_last?",
    "seed.x=4": "seed has no fields to set",
    "task=4": "task is not a number or a word; set it in the job file",
    "global_batch=many": "global_batch=many: Expected `int`",
    "global_batch=0": "global_batch must be greater than 0, not 0",
    "precision=fp8": "precision=fp8: Invalid enum value 'fp8'",
    "global_batch": "a setting must read FIELD=VALUE",
}


@pytest.mark.parametrize(("setting", "reason"), SETTINGS.items())
def test_a_setting_is_refused_such_as(job_file, setting, reason):
    assert reason in tried(job_file(), setting)


USAGES = {
    "a verb": (["trian", "job.py"], "did you mean train?"),
    "an option": (["train", "job.py", "--worker", "2"], "--workers"),
    "a field": (["train", "JOB", "--set", "globl_batch=4"], "did you mean global_batch?"),
    "a launcher": (["train", "JOB", "--on", "slurm"], "'local', 'hosts', 'ray', 'manual'"),
    "a number of workers": (["train", "JOB", "--workers", "0"], "workers must be at least 1"),
    "a falling range of workers": (["train", "JOB", "--workers", "3..2"], "a range must not fall"),
    "an address": (["train", "JOB", "--listen", "here"], "listen takes HOST:PORT"),
    "a port": (["train", "JOB", "--listen", "127.0.0.1:70000"], "listen takes HOST:PORT"),
    "a job file": (["train", "nowhere.py"], "nowhere.py does not exist"),
    "no job file": (["train"], "a job file is needed"),
    "a job file to resume": (["train", "JOB", "--resume", "run"], "leave out the job file"),
    "another store to resume": (["train", "--resume", "run", "--store", "elsewhere"], "leave out --store"),
    "a step without a run to resume": (["train", "JOB", "--from-step", "3"], "goes with --resume"),
}


@pytest.mark.parametrize(("arguments", "reason"), USAGES.values(), ids=USAGES.keys())
def test_a_command_is_refused_with(command, job_file, arguments, reason):
    path = job_file()
    answer = command(*(path if argument == "JOB" else argument for argument in arguments))
    assert answer.code == 2
    assert reason in answer.err
    assert not runs_folder().exists()


@pytest.mark.parametrize("verb", ["status", "eval", "serve", "stop", "scale", "predict", "train --resume"])
def test_a_run_that_there_is_not_is_said_not_to_be(command, tmp_path, verb):
    (tmp_path / "inputs.json").write_text("{}")
    more = {"scale": ["2"], "predict": [tmp_path / "inputs.json"]}.get(verb, [])
    answer = command(*verb.split(), "nowhere", *more)
    assert answer.code == 2
    assert "no such run" in answer.err and "`shoal runs` lists what there is" in answer.err


def test_without_any_run_there_is_no_latest(command):
    answer = command("status")
    assert answer.code == 2 and "there are no runs in" in answer.err


@pytest.fixture(name="taken_port")
def _taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_a_run_cannot_listen_on_a_port_in_use(command, job_file, taken_port):
    answer = command("train", job_file(), "--listen", f"127.0.0.1:{taken_port}")
    assert answer.code == 2
    assert f"cannot listen on 127.0.0.1:{taken_port}" in answer.err and "choose another port" in answer.err


DECODE = """lambda rows: (
    torch.tensor(rows["x"].to_pylist()).view(-1, 1).expand(-1, 4),
    torch.tensor(rows["y"].to_pylist()).view(-1, 1),
)"""


@pytest.fixture(name="parquet_job")
def _parquet_job(job_file: Callable[..., Path]) -> Callable[..., Path]:
    def write(*paths: Path) -> Path:
        source = f"shoal.Parquet({[str(path) for path in paths]}, decode={DECODE})"
        return job_file({"shoal.Arrays(x, x.sum(1, keepdim=True))": source})

    return write


def write_table(path: Path, **columns: list[float]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=16)
    return path


@pytest.fixture(name="table")
def _table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "points.parquet", x=[float(i) for i in range(64)], y=[0.0] * 64)


def test_a_parquet_file_that_is_not_there_is_named(parquet_job, tmp_path):
    assert "gone.parquet stands for none" in tried(parquet_job(tmp_path / "gone.parquet"))


def test_a_truncated_parquet_file_is_named(parquet_job, table):
    table.write_bytes(table.read_bytes()[:-20])
    assert re.search(r"points.parquet cannot be read as Parquet: .*truncated", tried(parquet_job(table)))


def test_parquet_files_of_two_schemas_are_named_with_the_column(parquet_job, table, tmp_path):
    other = write_table(tmp_path / "other.parquet", x=[1.0], z=[1.0])
    reason = r"column y is double in \S*points.parquet and absent in \S*other.parquet"
    assert re.search(reason, tried(parquet_job(table, other)))


def test_a_parquet_file_that_is_spoilt_in_the_middle_fails_the_run(command, parquet_job, table):
    data = bytearray(table.read_bytes())
    middle = pq.ParquetFile(table).metadata.row_group(3).column(0).data_page_offset
    data[middle : middle + 60] = bytes(60)
    table.write_bytes(data)
    answer = command("train", parquet_job(table), "--quiet")
    assert answer.code == 1
    assert "row group 3 of" in answer.err and "cannot be read" in answer.err and "points.parquet" in answer.err


def test_inputs_that_do_not_fit_are_refused_with_the_reason(command, job_file, tmp_path):
    assert command("train", job_file(), "--name", "run", "--quiet").code == 0
    inputs = tmp_path / "inputs.json"
    reasons = {
        "{": "is not JSON",
        "[1]": "must hold an object",
        json.dumps({"output": [[1, 2, 3, 4]]}): "input input is needed (FP32 [-1, 4]); came: output",
        json.dumps({"input": [[1, 2, 3]]}): "input input must be of shape [-1, 4], not [1, 3]",
        json.dumps({"input": [["a", "b", "c", "d"]]}): "input input must be FP32",
    }
    for text, reason in reasons.items():
        inputs.write_text(text)
        answer = command("predict", "run", inputs)
        assert answer.code == 2 and reason in answer.err


def test_a_job_without_test_data_cannot_be_evaluated(command, job_file):
    assert command("train", job_file({"    test=points,\n": ""}), "--name", "run", "--quiet").code == 0
    answer = command("eval", "run")
    assert answer.code == 2 and "the job has no test data" in answer.err
