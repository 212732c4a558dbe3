"""The command does what its pages say, tells it as JSON, and ends with the right code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import mlflow.pyfunc
import numpy as np
import onnxruntime
import pytest
import torch

from shoal.cli import main
from shoal.launch.run import find_run
from shoal.serving.package import Probe, read, write
from tests.runs import rated
from tests.runs.background import in_background

pytestmark = pytest.mark.cluster

SHOAL = Path(sys.executable).with_name("shoal")
LOSS = "        return nn.functional"
SLOW = {"import torch\n": "import time\n\nimport torch\n", LOSS: f"        time.sleep(0.02)\n{LOSS}"}
FAILING = {LOSS: f"        self.left = getattr(self, 'left', 4) - 1\n        1 / self.left\n{LOSS}"}
LONG = ["--set", "epochs=100", "--set", "log_every_steps=1"]


@pytest.fixture(scope="module", name="trained")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that the command trained, started from the job's own folder; and what it said."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(Path(__file__).parent / "line.py", folder / "line.py")
    command = [SHOAL, "train", "line.py", "--workers", "2", "--name", "run", "--set", "storing.every_steps=5", "--json"]
    environment = {**os.environ, "SHOAL_RUNS": str(folder / "runs")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generation 1: w0, w1, from step 0 of the seed" in done.stderr
    return folder / "runs", json.loads(done.stdout)


@pytest.fixture(name="figures")
def _figures(trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Those that training ended with; ``run`` is the newest run."""
    monkeypatch.setenv("SHOAL_RUNS", str(trained[0]))
    return trained[1]["figures"]


@pytest.fixture(name="inputs")
def _inputs(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.json"
    path.write_text(json.dumps({"input": [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]}))
    return path


def test_train_tells_the_run_its_outcome_and_its_figures(trained):
    assert trained[1].keys() == {"run", "outcome", "figures"}
    assert (trained[1]["run"], trained[1]["outcome"]) == ("run", "done")
    assert 0 < trained[1]["figures"]["rmse"] < 0.5


def test_status_and_runs_tell_of_a_run_that_is_done(command, figures):
    told = command("status", "run", "--json").value
    assert told == command("status", "latest", "--json").value
    assert told == {**command("runs", "--json").value[0], "services": []}
    assert (told["outcome"], told["figures"]) == ("done", figures)
    assert "done" in command("status").out and "done" in command("runs").out


def test_status_tells_what_has_happened(command, figures):
    events = [json.loads(line) for line in command("status", "run", "--events", "--json").out.splitlines()]
    stored = [event["step"] for event in events if event["kind"] == "stored"]
    assert (stored[0], stored[-1]) == (5, 16)
    assert "version 16 is stored" in command("status", "run", "--events").out


def test_eval_has_the_figures_of_training_at_any_number_of_workers(command, figures):
    assert command("eval", "run", "--json").value == command("eval", "run", "--workers", "3", "--json").value == figures
    oldest = min(int(folder.name) for folder in (Path(os.environ["SHOAL_RUNS"]) / "run" / "versions").iterdir())
    assert command("eval", "run", "--version", oldest, "--json").value["rmse"] > figures["rmse"]
    assert f"{figures['rmse']:.6f}" in command("eval").out


@pytest.fixture(name="server")
def _server(figures: dict[str, float]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([SHOAL, "serve", "run", "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_server_answers_refuses_and_ends_by_its_signal(command, server, inputs):
    url = server.stderr.readline().removeprefix("serving at ").strip()
    asked, in_place = command("predict", url, inputs), command("predict", "run", inputs)
    assert asked.code == 0 and asked.value == in_place.value and len(asked.value["output"]) == 2
    malformed = httpx.post(f"{url}/infer", content=b'{"inputs": [')
    assert malformed.status_code == 400 and "JSON" in malformed.json()["error"]
    misshapen = command("predict", url, _written(inputs, {"input": [[1.0]]}))
    assert misshapen.code == 2 and "answered 400" in misshapen.err
    server.send_signal(signal.SIGTERM)
    assert server.wait() in (-signal.SIGTERM, 143)


def _written(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(name="package")
def _package(command, figures, tmp_path: Path) -> Path:
    answer = command("export", "run", "--to", tmp_path / "package")
    assert answer.out.strip() == str(tmp_path / "package"), answer.err
    return tmp_path / "package"


def test_a_package_is_checked_and_answers_as_its_run(command, package, inputs, figures, trained):
    job_file = trained[0].parent / "line.py"
    told = command("verify", package, "--json").value
    assert (told["name"], told["version"]) == ("line", max(stored_steps(trained[0])))
    assert command("verify", package, "--job", job_file, "--json").value == {**told, "probed": 32}
    of_run = command("predict", "run", inputs).value
    assert command("predict", package, inputs, "--job", job_file).value == of_run
    assert json.loads((package / "model.json").read_text())["metrics"] == figures
    with served(package, "--job", job_file) as url:
        assert command("predict", url, inputs).value == of_run


def stored_steps(runs: Path) -> list[int]:
    return [int(folder.name) for folder in (runs / "run" / "versions").iterdir()]


@contextmanager
def served(*arguments: object) -> Iterator[str]:
    words = [str(SHOAL), "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield process.stderr.readline().removeprefix("serving at ").strip()
        finally:
            process.terminate()


def test_a_package_is_refused_with_the_reason(command, package, inputs, trained, tmp_path):
    job_file = trained[0].parent / "line.py"
    without = command("predict", package, inputs)
    assert without.code == 2 and "give the file line.py of its task Line with --job" in without.err
    assert command("predict", package, inputs, "--job", job_file, "--version", 5).code == 2
    of_a_server = command("predict", "http://127.0.0.1:1/v2/models/line", inputs, "--job", job_file)
    assert of_a_server.code == 2 and "has its own version and code" in of_a_server.err
    of_a_run = command("predict", "run", inputs, "--job", job_file)
    assert of_a_run.code == 2 and "a run knows its job" in of_a_run.err
    other = tmp_path / "other.py"
    other.write_text(job_file.read_text() + "\n# changed\n")
    changed = command("verify", package, "--job", other)
    assert changed.code == 2 and "bring the code that it was exported with" in changed.err
    again = command("export", "run", "--to", package)
    assert again.code == 2 and "is there already" in again.err
    (package / "model.safetensors").write_bytes(b"nothing of the kind")
    assert command("verify", package).code == 1
    nowhere = command("verify", tmp_path / "nowhere")
    assert nowhere.code == 2 and "is no model package" in nowhere.err


def test_a_package_whose_answers_have_changed_is_skewed(command, package, trained):
    told = read(package)
    outputs = {name: output + 1 for name, output in told.probe.outputs.items()}
    skewed = package.with_name("skewed")
    write(replace(told, probe=Probe(told.probe.inputs, outputs)), skewed)
    answer = command("verify", skewed, "--job", trained[0].parent / "line.py")
    assert answer.code == 1 and "answers otherwise than when it was exported" in answer.err


def test_a_package_has_the_tables_of_all_shards(command, tmp_path):
    job_file = Path(__file__).parent / "rated.py"
    assert command("train", job_file, "--name", "run").code == 0
    assert command("export", "run", "--to", tmp_path / "package").code == 0
    told = command("verify", tmp_path / "package", "--job", job_file, "--json").value
    assert told["probed"] == 32
    inputs = tmp_path / "inputs.json"
    inputs.write_text(json.dumps({"user": [*rated.users[:5].tolist(), 7], "tags": rated.tags[:6].tolist()}))
    of_run = command("predict", "run", inputs).value
    assert command("predict", tmp_path / "package", inputs, "--job", job_file).value == of_run
    shutil.rmtree(tmp_path / "runs")
    assert command("predict", tmp_path / "package", inputs, "--job", job_file).value == of_run


def test_a_server_wants_the_signature_that_it_was_told_of(command, figures, inputs, trained, tmp_path):
    key, public = tmp_path / "key.pem", tmp_path / "key.pub.pem"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    subprocess.run(["openssl", "ec", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    package, job_file = tmp_path / "package", trained[0].parent / "line.py"
    assert command("export", "run", "--to", package, "--sign", key).code == 0
    assert command("verify", package, "--signed-by", public, "--json").value["signed_by"] == str(public)
    asked = ("predict", package, inputs, "--job", job_file, "--signed-by", public)
    assert command(*asked).value == command("predict", "run", inputs).value
    (package / "model.sig").unlink()
    for words in (asked, ("serve", package, "--job", job_file, "--signed-by", public)):
        unsigned = command(*words)
        assert unsigned.code == 2 and "must be signed" in unsigned.err
    of_a_run = command("predict", "run", inputs, "--signed-by", public)
    assert of_a_run.code == 2 and "--signed-by is for packages" in of_a_run.err
    of_no_package = command("export", "run", "--as", "onnx", "--sign", key)
    assert of_no_package.code == 2 and "a signature is a package's" in of_no_package.err


@pytest.mark.parametrize(("form", "name"), [("onnx", "line-16.onnx"), ("torch", "line-16.pt2")])
def test_a_run_is_exported_as_a_graph_beside_its_package(command, figures, inputs, tmp_path, monkeypatch, form, name):
    monkeypatch.chdir(tmp_path)
    assert command("export", "run", "--as", form).out.strip() == name
    rows = np.asarray(json.loads(inputs.read_text())["input"], np.float32)
    if form == "onnx":
        found = onnxruntime.InferenceSession(name).run(["output"], {"input": rows})[0]
    else:
        found = torch.export.load(name).module()({"input": torch.from_numpy(rows)})["output"].detach()
    np.testing.assert_allclose(found, command("predict", "run", inputs).value["output"], rtol=1e-5)
    again = command("export", "run", "--as", form)
    assert again.code == 2 and "is there already" in again.err


def test_a_run_with_tables_is_exported_for_mlflow_and_is_no_graph(command, tmp_path):
    job_file = shutil.copy(Path(__file__).parent / "rated.py", tmp_path / "films.py")
    assert command("train", job_file, "--name", "run").code == 0
    graph = command("export", "run", "--as", "onnx")
    assert graph.code == 2 and "films reads rows of tables" in graph.err
    made = command("export", "run", "--as", "mlflow", "--to", tmp_path / "films.mlflow")
    assert made.code == 0, made.err
    inputs = {"user": rated.users[:5].astype(np.int64), "tags": rated.tags[:5].astype(np.int64)}
    found = mlflow.pyfunc.load_model(str(tmp_path / "films.mlflow")).predict(inputs)
    asked = _written(tmp_path / "inputs.json", {name: array.tolist() for name, array in inputs.items()})
    np.testing.assert_allclose(found["rating"], command("predict", "run", asked).value["rating"], rtol=1e-6)


def test_predict_reads_standard_input(command, figures, monkeypatch, inputs):
    with inputs.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert len(command("predict", "run", "-").value["output"]) == 2


def test_nothing_serves_on_a_port_in_use(command, figures):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = command("serve", "run", "--port", port)
    assert answer.code == 2 and f"cannot serve on 127.0.0.1:{port}" in answer.err


def test_a_run_is_watched_scaled_and_stopped(command, job_file):
    call = partial(main, ["train", str(job_file(SLOW)), "--workers", "2", "--name", "run", "--quiet", *LONG])
    with in_background(call, "run") as run:
        run.until_step(3)
        status = command("status", "run", "--json").value
        assert status["total_steps"] == 800 and [worker["rank"] for worker in status["workers"]] == [0, 1]
        assert command("runs", "--json").value[0]["outcome"] == "running"
        assert command("scale", "run", "3").code == 0
        run.until("healed")
        assert len(command("status", "run", "--json").value["workers"]) == 3
        stopped = command("stop", "run")
        assert stopped.code == 0 and "it was asked to stop; step" in stopped.out
        assert run.wait() == 0
    assert command("status", "run", "--json").value["outcome"] == "stopped"
    for refused in (command("stop", "run"), command("scale", "run", "2")):
        assert refused.code == 2 and "run is not under way" in refused.err


def test_a_run_does_not_leave_its_range_of_workers(command, job_file):
    call = partial(main, ["train", str(job_file(SLOW)), "--workers", "1..2", "--name", "run", "--quiet", *LONG])
    with in_background(call, "run") as run:
        run.until_step(1)
        answer, of_shards, of_nothing = (
            command("scale", "run", *words) for words in (["3"], ["--shards", "2"], [])
        )  # fmt: skip
    assert answer.code == 2 and "this run takes 1 to 2 workers" in answer.err
    assert of_shards.code == 2 and "this run has no table shards" in of_shards.err
    assert of_nothing.code == 2 and "say how many workers, or --shards" in of_nothing.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command_is_its_exit_code(command, job_file, number, code):
    call = partial(main, ["train", str(job_file(SLOW)), "--name", "run", *LONG])
    with in_background(call, "run") as run:
        run.until_step(3)
        os.kill(run.pid, number)
        assert run.until("stored")["step"] >= 3
        assert run.wait() == code
    assert command("status", "run", "--json").value["outcome"] == "stopped"


def test_a_job_that_fails_under_way_fails_the_command_and_says_where(command, job_file):
    answer = command("train", job_file(FAILING), "--quiet")
    assert answer.code == 1
    assert "ZeroDivisionError in" in answer.err and "job.py:21" in answer.err and "worker w0, step 3" in answer.err


def test_a_run_that_was_killed_is_said_to_be_cut_off(command, job_file):
    call = partial(main, ["train", str(job_file(SLOW)), "--name", "run", "--quiet", *LONG])
    with in_background(call, "run") as run:
        run.until_step(1)
        run.kill_everything()
    assert command("runs", "--json").value[0]["outcome"] == "cut off"
    resumed = command("train", "--resume", "run", "--set", "epochs=1", "--json", "--quiet")
    assert resumed.code == 0 and resumed.value["outcome"] == "done"


def test_workers_that_are_started_by_hand_train_together(command, job_file):
    path = job_file()
    train = partial(main, ["train", str(path), "--on", "manual", "--workers", "2", "--name", "run", "--quiet"])
    with ExitStack() as stack:
        run = stack.enter_context(in_background(train, "run"))
        run.until_listening()
        address, key = find_run("run").read_control().address, str(find_run("run").key_path)
        join = ["worker", str(path), "--join", address, "--key", key, "--name"]
        workers = [stack.enter_context(in_background(partial(main, [*join, n]), "run")) for n in ("ann", "bob")]
        assert [worker.wait() for worker in workers] == [0, 0]
        assert run.wait() == 0
    assert [event["members"] for event in run.events if event["kind"] == "generation"] == [["ann", "bob"]]
    assert command("status", "run", "--json").value["outcome"] == "done"
