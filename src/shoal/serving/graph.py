"""A model as a graph, for other servers: ONNX, and torch's own exported program."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_config
from torch import Tensor, nn

from shoal.errors import ConfigError, Fault
from shoal.job.task import TensorSpec
from shoal.serving.datatypes import refuse_without_numpy
from shoal.serving.extra import extra
from shoal.serving.packaged import differences_of
from shoal.serving.predictor import ModelPredictor, two_zeros
from shoal.serving.whole import whole
from shoal.shards import has_tables

_MOST_ONNX_BYTES = 2**31 - 2**20
"""What protobuf lets be in one message, less what the graph itself takes."""

Answer = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def write_torch(served: ModelPredictor, samples: Mapping[str, Tensor], target: Path) -> None:
    """Write a model as an ``ExportedProgram`` (``torch.export.load``) that takes and gives tensors by name, any number
    of samples. What was written is read again, and must answer ``samples`` as the model does (``Fault`` if not).
    ``ConfigError`` for a model that has no graph, or a file that is there already."""
    program = _traced(served)
    with whole(target) as partial:
        with partial.open("xb") as file:
            torch.export.save(program, file)
            file.flush()
            os.fsync(file.fileno())
        with _quiet():
            read = torch.export.load(partial).module()
        with torch.inference_mode():
            _require_same(served, samples, lambda inputs: read(dict(inputs)), target)


def write_onnx(served: ModelPredictor, samples: Mapping[str, Tensor], target: Path) -> None:
    """Write a model as ONNX, its inputs and outputs named as in the task, any number of samples; ``onnxruntime`` must
    answer ``samples`` with it as the model does (``Fault`` if not). ``ConfigError`` for a model that has no graph, that
    ONNX has no operators for, or that takes more than the 2 GB of one file; for a file that is there already; and
    without the extra ``shoal[export]``."""
    with extra("export", "ONNX"):
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter is written in it
    refuse_without_numpy([*served.inputs, *served.outputs])
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in served.model.state_dict().values())
    if num_bytes > _MOST_ONNX_BYTES:
        raise ConfigError(f"an ONNX file holds 2 GB, and the model has {num_bytes} bytes; export it as torch")
    data = _as_onnx(served)
    with whole(target) as partial:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ConfigError(f"onnxruntime {onnxruntime.__version__} cannot run what ONNX made: {error}") from error
        names = [spec.name for spec in served.outputs]

        def answer(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
            return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

        _require_same(served, samples, answer, target)


class _Named(nn.Module):
    """A predictor as a module: from tensors by name to tensors by name."""

    def __init__(self, served: ModelPredictor) -> None:
        super().__init__()
        self.model = served.model
        self._served = served

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._served.task.predict(self.model, inputs)
        return {spec.name: outputs[spec.name] for spec in self._served.outputs}


def _traced(served: ModelPredictor) -> torch.export.ExportedProgram:
    """The graph of a model, in which the samples and what else is free may be of any number."""
    if has_tables(served.model):
        raise ConfigError(
            f"{served.name} reads rows of tables, which are looked up by id and are no part of a graph; export it as "
            "a package or for mlflow, which bring the tables along"
        )
    # Else a graph that was traced from two samples may hold to "more than one"; torch's exporter to ONNX does the same.
    any_number = symbolic_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), _quiet(), any_number:
            return torch.export.export(
                _Named(served).eval(),
                (two_zeros(served.inputs),),
                dynamic_shapes=_free_axes(served),
            )
    except Exception as error:
        raise ConfigError(
            f"{served.name} cannot be made a graph: its predict must be torch operations only, that do not depend on "
            f"values and work for any number of samples; export it as a package. torch.export says: {error}"
        ) from error


def _free_axes(served: ModelPredictor) -> tuple[dict[str, dict[int, Any]]]:
    def axes(spec: TensorSpec) -> dict[int, Any]:
        others = {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if size == -1 and axis}
        return {0: samples, **others}

    samples = torch.export.Dim("samples")
    return ({spec.name: axes(spec) for spec in served.inputs},)


def _as_onnx(served: ModelPredictor) -> bytes:
    program = _traced(served)
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                program, dynamo=True, verbose=False, external_data=False, dynamic_shapes=_free_axes(served),
                input_names=[spec.name for spec in served.inputs], output_names=[spec.name for spec in served.outputs],
            )  # fmt: skip
            data: bytes = made.model_proto.SerializeToString()
            return data
    except Exception as error:
        raise ConfigError(f"{served.name} cannot be made ONNX; export it as a package or torch: {error}") from error


def _require_same(served: ModelPredictor, samples: Mapping[str, Tensor], answer: Answer, target: Path) -> None:
    """Ask the same of both: for all samples, and for the first alone, since a graph may hold to a number of them."""
    for asked in (samples, {name: tensor[:1] for name, tensor in samples.items()}):
        expected = served.predict(asked)
        num = len(next(iter(asked.values())))
        try:
            found = differences_of(answer(asked), expected)
        except Exception as error:
            raise ConfigError(
                f"{target} is not written: as a graph, the model does not answer {num} samples, but only some other "
                f"numbers of them; export it as a package. It says: {error}"
            ) from error
        if wrong := {name: value for name, value in found.items() if value}:
            raise Fault(f"{target} would answer {num} samples otherwise than the model does: {wrong} at most")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's words on its own deprecations and on packages that it would use if they were there."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
