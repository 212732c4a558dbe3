"""What is exported for other servers answers there as the model does here, or is not written."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.errors import ConfigError, Fault
from shoal.job.task import TensorSpec
from shoal.serving import ModelPredictor, make_predictor
from shoal.serving.graph import write_onnx, write_torch
from tests.serving.scaled import Scaled

WRITERS = {"onnx": write_onnx, "torch": write_torch}


class Bags(Scaled):
    """The mean of as many words as a sample has, and what the task is asked and does not use."""

    def model(self) -> nn.Module:
        return nn.EmbeddingBag(10, 2)

    def inputs(self) -> Sequence[TensorSpec]:
        return [TensorSpec("words", "INT64", (-1, -1)), TensorSpec("unused", "FP32", (-1,))]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"mean": model(inputs["words"])}


class Looks(Scaled):
    """Decides by a value."""

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"scores": model(inputs["row"]) * (2 if inputs["row"].sum() > 0 else 1)}


class Pairs(Scaled):
    """Answers pairs only."""

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"scores": inputs["row"].view(2, 3)}


class Rows(Scaled):
    """Reads a table."""

    def model(self) -> nn.Module:
        return shoal.Embedding("users", 2)

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"rows": model(inputs["times"])}


class Halves(Scaled):
    """Takes a datatype that NumPy lacks."""

    def inputs(self) -> Sequence[TensorSpec]:
        return [TensorSpec("row", "BF16", (-1, 3))]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"scores": model(inputs["row"].float())}


def made(task: Scaled) -> ModelPredictor:
    torch.manual_seed(1)
    return make_predictor(task, task.model().state_dict(), name="made", version=3)


SAMPLES: dict[type[Scaled], dict[str, Tensor]] = {
    Scaled: {"row": torch.arange(15.0).view(5, 3), "times": torch.arange(5)},
    Bags: {"words": torch.arange(12).view(3, 4) % 10, "unused": torch.zeros(3)},
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_onnx_answers_as_the_model_for_any_number_of_samples(kind, tmp_path):
    served = made(kind())
    write_onnx(served, SAMPLES[kind], tmp_path / "made.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "made.onnx")
    assert [found.shape[0] for found in session.get_inputs()] == ["samples"] * len(served.inputs)
    for num in (1, 2, 3):
        asked = {name: tensor[:num] for name, tensor in SAMPLES[kind].items()}
        found = session.run(None, {name: tensor.numpy() for name, tensor in asked.items()})
        for wanted, came in zip(served.predict(asked).values(), found, strict=True):
            np.testing.assert_allclose(came, wanted.numpy(), rtol=1e-5)
    assert os.listdir(tmp_path) == ["made.onnx"]


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_exported_program_answers_as_the_model_for_any_number_of_samples(kind, tmp_path):
    served = made(kind())
    write_torch(served, SAMPLES[kind], tmp_path / "made.pt2")
    program = torch.export.load(tmp_path / "made.pt2").module()
    for num in (1, 2, 3):
        asked = {name: tensor[:num] for name, tensor in SAMPLES[kind].items()}
        found, wanted = program(asked), served.predict(asked)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Looks(), "that do not depend on values"),
        (Pairs(), "work for any number of samples"),
        (Rows(), "reads rows of tables"),
    ],
)
def test_what_is_no_graph_is_refused(form, task, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        WRITERS[form](made(task), SAMPLES[Scaled], tmp_path / "made")
    assert not os.listdir(tmp_path)


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "made").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        write_torch(made(Scaled()), SAMPLES[Scaled], tmp_path / "made")
    assert (tmp_path / "made").read_text() == "mine"


@pytest.mark.parametrize("form", WRITERS)
def test_what_answers_otherwise_is_not_written(form, tmp_path, monkeypatch):
    served = made(Scaled())
    right = served.task.predict
    calls = iter(range(100))
    wrong = lambda model, inputs: {name: out + next(calls) for name, out in right(model, inputs).items()}  # noqa: E731
    monkeypatch.setattr(served.task, "predict", wrong)
    with pytest.raises(Fault, match="otherwise than the model does"):
        WRITERS[form](served, SAMPLES[Scaled], tmp_path / "made")
    assert not os.listdir(tmp_path)


def test_onnx_without_its_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"ONNX needs the package onnxscript: pip install 'shoal\[export\]'"):
        write_onnx(made(Scaled()), SAMPLES[Scaled], tmp_path / "made.onnx")


def test_onnx_of_a_datatype_that_numpy_lacks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="row is BF16"):
        write_onnx(made(Halves()), {}, tmp_path / "made.onnx")


def test_a_parent_folder_is_made(tmp_path: Path):
    write_torch(made(Scaled()), SAMPLES[Scaled], tmp_path / "new" / "made.pt2")
    assert os.listdir(tmp_path / "new") == ["made.pt2"]
