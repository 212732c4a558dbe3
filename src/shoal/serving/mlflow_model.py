"""A model for MLflow: a folder with a package and the job's code, which MLflow has this module load.

``data/model/package`` is the package, ``data/model/job`` the job file with what it imports from its folder. Nothing is
pickled. To load it is to run that code, as with every MLflow model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shoal.errors import ConfigError, Fault, ShoalError
from shoal.job import files_of
from shoal.job.task import TensorSpec
from shoal.serving.datatypes import DTYPES, refuse_without_numpy
from shoal.serving.package import Package, read, write
from shoal.serving.packaged import differences_of, with_code
from shoal.serving.predictor import ModelPredictor
from shoal.serving.whole import whole

_MODULE = "shoal.serving.mlflow_model"
_PACKAGE, _JOB = "package", "job"
_OFFLINE = {"MLFLOW_DISABLE_TELEMETRY": "true"}

Arrays = Mapping[str, npt.NDArray[Any]]


def write_mlflow(package: Package, job_file: Path, target: Path) -> None:
    """Write a package as an MLflow model of the pyfunc flavour. ``job_file``: of its task, which has been loaded.

    A process of its own writes it, loads it by ``mlflow.pyfunc`` and asks it the package's probe: ``Fault`` if that
    fails, or it answers otherwise. ``ConfigError`` if ``target`` is there already, an input or output has no NumPy
    type, or the extra ``shoal[export]`` is missing.
    """
    if missing := [name for name in ("mlflow", "pandas") if find_spec(name) is None]:
        raise ConfigError(f"an MLflow model needs the package {missing[0]}: pip install 'shoal[export]'")
    refuse_without_numpy([*package.description.inputs, *package.description.outputs])
    with whole(target) as partial, tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        write(package, model / _PACKAGE)
        for file in files_of(job_file):
            copy = model / _JOB / file.relative_to(job_file.resolve().parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        command = [sys.executable, "-P", "-B", "-m", _MODULE, str(model), str(partial)]
        made = subprocess.run(command, env={**os.environ, **_OFFLINE}, capture_output=True, text=True, check=False)
        if made.returncode:
            raise Fault(f"{target} could not be made an MLflow model:\n{made.stderr.strip()}")


def _load_pyfunc(path: str) -> _Pyfunc:
    """What MLflow calls to load the model; ``path``: its data."""
    package = read(Path(path) / _PACKAGE)
    job_file = Path(path) / _JOB / Path(package.description.task.job_file).name
    return _Pyfunc(with_code(package, job_file)[1])


class _Pyfunc:
    """A predictor as MLflow calls it: arrays by name, the first axis counting samples."""

    def __init__(self, served: ModelPredictor) -> None:
        self._served = served

    def predict(self, model_input: Arrays, params: Mapping[str, Any] | None = None) -> dict[str, npt.NDArray[Any]]:
        inputs = {
            spec.name: torch.tensor(np.asarray(model_input[spec.name]), dtype=DTYPES[spec.datatype])
            for spec in self._served.inputs
        }
        return {name: tensor.numpy() for name, tensor in self._served.predict(inputs).items()}


def _make(data: Path, target: Path) -> None:
    """Write the MLflow model of a package and a job's code, load it, and ask it the probe."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature

    package = read(data / _PACKAGE)
    told = package.description
    mlflow.pyfunc.save_model(
        str(target), loader_module=_MODULE, data_path=str(data),
        signature=ModelSignature(_schema(told.inputs), _schema(told.outputs)),
        pip_requirements=[f"{name}=={version_of(name).partition('+')[0]}" for name in ("shoal", "torch", "numpy")],
        metadata={"shoal_package": package.digest},
    )  # fmt: skip
    model = mlflow.pyfunc.load_model(str(target))
    if package.probe.inputs:
        found = model.predict({name: tensor.numpy() for name, tensor in package.probe.inputs.items()})
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        wrong = {name: value for name, value in differences_of(tensors, package.probe.outputs).items() if value}
        if wrong:
            raise Fault(f"it answers otherwise than the model does: {wrong} at most")


def _schema(specs: list[TensorSpec]) -> Any:
    from mlflow.types import Schema
    from mlflow.types import TensorSpec as Spec

    dtypes = [torch.empty(0, dtype=DTYPES[spec.datatype]).numpy().dtype for spec in specs]
    return Schema([Spec(dtype, spec.shape, spec.name) for dtype, spec in zip(dtypes, specs, strict=True)])


if __name__ == "__main__":
    try:
        _make(Path(sys.argv[1]), Path(sys.argv[2]))
    except ShoalError as error:
        sys.exit(error.message)
