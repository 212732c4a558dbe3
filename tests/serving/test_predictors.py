"""From a task and a version's tensors to what is served."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.errors import ConfigError, Fault
from shoal.job import TensorSpec
from shoal.serving import ModelPredictor, make_predictor
from shoal.serving.predictor import warm_up
from tests.serving.scaled import Scaled


class Plain:
    """A task that does not say how it is served."""

    def model(self) -> nn.Module:
        return nn.Linear(3, 2)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).mean()

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {}


class Says(Plain):
    """A task whose inputs and outputs a test decides."""

    def __init__(self, inputs: list[TensorSpec], answer: Any = None) -> None:
        self._inputs, self._answer = inputs, answer

    def inputs(self) -> list[TensorSpec]:
        return self._inputs

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        return {"y": model(inputs["x"])} if self._answer is None else self._answer


def made(task: Any, **options: Any) -> ModelPredictor:
    return make_predictor(task, task.model().state_dict(), name="m", version=1, **options)


def test_predictions_come_from_the_versions_tensors_in_eval_mode_without_grad(predictor: ModelPredictor) -> None:
    outputs = predictor.predict({"row": torch.ones(1, 3, requires_grad=True), "times": torch.tensor([2])})
    assert outputs["scores"].tolist() == [[12.0, 1.0]]
    assert outputs["scores"].is_inference() and not outputs["scores"].requires_grad


@pytest.mark.parametrize(
    ("max_samples", "max_batch_s", "sizes"), [(1, 9.0, [1]), (5, 9.0, [1, 2, 4, 5]), (8, 0.0, [1])]
)
def test_a_model_warms_up_on_larger_and_larger_batches_of_what_it_knows(max_samples, max_batch_s, sizes) -> None:
    came = []

    class Listens(Says):
        def predict(self, model: nn.Module, inputs: Any) -> Any:
            came.append(inputs["x"][:, 0].tolist())
            return super().predict(model, inputs)

    predictor = made(Listens([TensorSpec("x", "FP32", (-1, 3))]))
    for samples, rows in (({}, [0.0]), ({"x": torch.tensor([[1.0] * 3, [2.0] * 3, [3.0] * 3])}, [1.0, 2.0, 3.0])):
        came.clear()
        warm_up(predictor, samples, max_samples, max_batch_s)
        assert came == [(rows * size)[:size] for size in sizes]


def test_a_model_that_fails_on_many_samples_says_on_how_many() -> None:
    class Few(Says):
        def predict(self, model: nn.Module, inputs: Any) -> Any:
            return {"y": model(inputs["x"].view(-1, 3)[:2].view_as(inputs["x"]))}

    with pytest.raises(Fault, match=r"^m fails on 4 samples at once: RuntimeError\("):
        warm_up(made(Few([TensorSpec("x", "FP32", (-1, 3))])), {"x": torch.ones(2, 3)}, 64, 9.0)


def test_tensors_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="version 9 does not fit the task's model"):
        make_predictor(Scaled(), {"0.weight": torch.zeros(2, 4)}, name="scaled", version=9)


def test_a_plain_task_is_served_as_its_model_of_an_examples_first_tensor() -> None:
    predictor = made(Plain(), example=(torch.zeros(5, 3), torch.zeros(5)))
    assert predictor.inputs == (TensorSpec("input", "FP32", (-1, 3)),)
    assert predictor.outputs == (TensorSpec("output", "FP32", (-1, 2)),)


def test_a_plain_tasks_input_is_named_for_its_column() -> None:
    assert made(Plain(), example={"pixels": torch.zeros(5, 3)}).inputs[0].name == "pixels"


def test_a_plain_task_without_an_example_is_refused() -> None:
    with pytest.raises(ConfigError, match="Plain needs the methods inputs and predict, or an example"):
        made(Plain())


def test_free_axes_stay_free_in_the_outputs() -> None:
    task = Says([TensorSpec("x", "FP32", (-1, -1, 3))])
    assert made(task).outputs == (TensorSpec("y", "FP32", (-1, -1, -1)),)


@pytest.mark.parametrize(
    ("inputs", "answer", "reason"),
    [
        ([], None, "at least one and named apart"),
        ([TensorSpec("x", "FP32", (-1, 3))] * 2, None, "named apart"),
        ([TensorSpec("x", "float", (-1, 3))], None, "datatype must be one of BOOL, "),
        ([TensorSpec("x", "FP32", (3,))], None, "shape must begin with -1"),
        ([TensorSpec("x", "FP32", (-1, 0))], None, "and be positive"),
        ([TensorSpec("x", "FP32", (-1, 4))], None, r"predict failed on zeros .*x: FP32 \[-1, 4\]"),
        ([TensorSpec("x", "FP32", (-1, 3))], torch.zeros(2), "tensors by name, not Tensor"),
        ([TensorSpec("x", "FP32", (-1, 3))], {"y": 3}, "output 'y' must be a tensor .*not int"),
        ([TensorSpec("x", "FP32", (-1, 3))], {"y": torch.zeros(1, 2)}, r"counts the samples, here 2, not \(1, 2\)"),
        ([TensorSpec("x", "FP32", (-1, 3))], {"y": torch.zeros(2, dtype=torch.cfloat)}, "not complex64"),
    ],
)
def test_a_task_that_says_the_wrong_thing_is_refused_before_it_is_served(
    inputs: list[TensorSpec], answer: Any, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        made(Says(inputs, answer))
