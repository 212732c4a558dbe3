"""An MLflow model holds a package and the job's code, and answers in MLflow as the model does here."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import mlflow.pyfunc
import msgspec
import numpy as np
import pytest
import torch

from shoal.errors import ConfigError, Fault
from shoal.job import hash_job, load_job
from shoal.job.task import TensorSpec
from shoal.serving.mlflow_model import write_mlflow
from shoal.serving.package import Package, Probe, read
from tests.serving.test_packages import ANSWERS, ROWS, package

NEIGHBOUR = "import torch\n\n\ndef model():\n    return torch.nn.Sequential(torch.nn.Linear(3, 2))\n"
JOB = """
import torch

import scaled_model
import shoal


class Scaled:
    def model(self):
        return scaled_model.model()

    def loss(self, model, batch):
        return self.predict(model, batch)["scores"].mean()

    def metrics(self, model, batch):
        return {}

    def inputs(self):
        return [shoal.TensorSpec("row", "FP32", (-1, 3)), shoal.TensorSpec("times", "INT64", (-1,))]

    def predict(self, model, inputs):
        scores = model(inputs["row"]) * inputs["times"][:, None]
        return {"scores": scores, "best": scores.argmax(dim=1)}


job = shoal.Job(
    task=Scaled(), train=shoal.Arrays(torch.zeros(4, 3)), epochs=1, global_batch=4,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
)
"""


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job and the module that it imports, loaded."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "scaled_model.py").write_text(NEIGHBOUR)
    (folder / "scaled.py").write_text(JOB)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "scaled_model", raising=False)
    load_job(folder / "scaled.py")
    return folder / "scaled.py"


def of_the_job(job_file: Path, **changed: object) -> Package:
    told = package(**changed)
    task = msgspec.structs.replace(told.description.task, revision=hash_job(job_file))
    return replace(told, description=msgspec.structs.replace(told.description, task=task))


def check_files(folder: Path) -> None:
    """Its data are a package and the job's files; nothing is pickled or compiled."""
    assert read(folder / "data" / "model" / "package").description.name == "scaled"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"data/model/job/scaled.py", "data/model/job/scaled_model.py", "MLmodel"} <= files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pyc", ".pt", ".bin"))]
    signature = mlflow.models.get_model_info(str(folder)).signature
    assert signature.inputs.input_names() == ["row", "times"]


def test_it_answers_in_mlflow_with_the_code_and_the_data_that_came_along(job_file, tmp_path, monkeypatch):
    write_mlflow(of_the_job(job_file), job_file, tmp_path / "scaled.mlflow")
    job_file.rename(tmp_path / "gone")
    check_files(tmp_path / "scaled.mlflow")
    monkeypatch.delitem(sys.modules, "scaled_model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "scaled.mlflow"))
    found = model.predict({name: tensor[:1].numpy() for name, tensor in ROWS.items()})
    np.testing.assert_allclose(found["scores"], ANSWERS["scores"][:1].numpy())
    assert found["best"].tolist() == [0]


def test_what_answers_otherwise_in_mlflow_is_not_written(job_file, tmp_path):
    skewed = replace(of_the_job(job_file), probe=Probe(ROWS, {**ANSWERS, "best": torch.tensor([1, 0])}))
    with pytest.raises(Fault, match=r"it answers otherwise than the model does: {'best': 1\.0} at most"):
        write_mlflow(skewed, job_file, tmp_path / "scaled.mlflow")
    assert not list(tmp_path.glob("*mlflow*"))


def test_a_datatype_that_numpy_lacks_is_refused(job_file, tmp_path):
    told = of_the_job(job_file, outputs=[TensorSpec("scores", "BF16", (-1, 2))])
    with pytest.raises(ConfigError, match="scores is BF16"):
        write_mlflow(told, job_file, tmp_path / "scaled.mlflow")


def test_without_the_extra_it_says_what_to_install(job_file, tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.serving.mlflow_model.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[export\]'"):
        write_mlflow(of_the_job(job_file), job_file, tmp_path / "scaled.mlflow")
