"""What answers a request: a task's model with a version's parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoal.errors import Bug, ConfigError, Fault
from shoal.job.task import Batch, Predicts, Task, TensorSpec
from shoal.serving.datatypes import DTYPES, Array, Arrays, Tensors, as_arrays, as_tensors, datatype_of
from shoal.serving.layout import FREE_SIZE, lay_out


class Predictor(Protocol):
    """A model that is served, under one name and version. Called by one thread at a time."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All outputs from all inputs, which fit the specs; the first axis counts samples in both."""
        ...


def computed(predict: Callable[[Tensors], Tensors], inputs: Arrays) -> dict[str, Array]:
    """All outputs of a predictor from all inputs. ``Bug`` unless each has a row for each sample, and a dtype that can
    be told: a batch is taken apart by its rows, so that one too few would be somebody else's answer."""
    outputs, num = predict(as_tensors(inputs)), len(next(iter(inputs.values())))
    for name, output in outputs.items():
        if output.shape[:1] != (num,):
            raise Bug(
                f"output {name!r} has the shape {list(output.shape)}, and its first axis must count {num} samples"
            )
    try:
        return as_arrays(outputs)
    except ConfigError as error:
        raise Bug(error.message) from error


def warm_up(predictor: Predictor, samples: Tensors, max_samples: int, max_batch_s: float) -> None:
    """Compute batches of 1, 2, 4 and so on to ``max_samples``, until one takes longer than ``max_batch_s``: what is
    made for each size, such as kernels and their memory, is there before anybody waits for it. They are of these
    samples over and over, or of zeros if there are none. ``Fault`` for a size that fails."""
    samples = samples or two_zeros(predictor.inputs)
    num, took_s = 1, 0.0
    while took_s <= max_batch_s:
        begun_s = time.perf_counter()
        try:
            predictor.predict({name: rows[torch.arange(num) % len(rows)] for name, rows in samples.items()})
        except Exception as error:
            raise Fault(f"{predictor.name} fails on {num} samples at once: {error!r}") from error
        took_s = time.perf_counter() - begun_s
        if num == max_samples:
            return
        num = min(2 * num, max_samples)


@dataclass(frozen=True, kw_only=True)
class ModelPredictor:
    """A model in eval mode and the task that says how it predicts."""

    name: str
    version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    task: Predicts
    model: nn.Module

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.inference_mode():
            return self.task.predict(self.model, inputs)


@dataclass(frozen=True)
class _Plain:
    """How a task that does not implement ``Predicts`` is served: ``model(first tensor of a batch)``."""

    spec: TensorSpec

    def inputs(self) -> Sequence[TensorSpec]:
        return [self.spec]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"output": model(inputs[self.spec.name])}


def make_predictor(
    task: Task, tensors: Mapping[str, Tensor], *, name: str, version: int, example: Batch | None = None
) -> ModelPredictor:
    """Build the task's model, load a version's parameters and buffers into it, and try it on two samples.

    The trial (zeros; 32 where a shape is free beyond the samples) says what the outputs are. Convolutions are computed
    channels last where that answers the same. A task that does not
    implement ``Predicts`` needs an ``example`` batch, whose first tensor says what the input is. ``ConfigError`` if the
    tensors are not the model's, or the trial fails.
    """
    model = task.model()
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise ConfigError(f"version {version} does not fit the task's model: {error}") from error
    model.eval()
    predicts = task if isinstance(task, Predicts) else _Plain(_spec_of(task, example))
    inputs = tuple(predicts.inputs())
    _check(inputs)
    outputs = _try(predicts, model, inputs)
    served = ModelPredictor(name=name, version=version, inputs=inputs, outputs=outputs, task=predicts, model=model)
    lay_out(model, served.predict, inputs)
    return served


def _spec_of(task: Task, example: Batch | None) -> TensorSpec:
    if example is None:
        raise ConfigError(
            f"to be served, {type(task).__name__} needs the methods inputs and predict, or an example of its batches"
        )
    name, first = next(iter(example.items())) if isinstance(example, Mapping) else ("input", example[0])
    return TensorSpec(name, datatype_of(first.dtype), (-1, *first.shape[1:]))


def _check(inputs: Sequence[TensorSpec]) -> None:
    if not inputs or len({spec.name for spec in inputs}) < len(inputs):
        raise ConfigError(f"inputs must be at least one and named apart, not {[spec.name for spec in inputs]}")
    for spec in inputs:
        if spec.datatype not in DTYPES:
            raise ConfigError(f"input {spec.name!r}: datatype must be one of {', '.join(DTYPES)}, not {spec.datatype}")
        if spec.shape[:1] != (-1,) or any(size != -1 and size < 1 for size in spec.shape):
            raise ConfigError(
                f"input {spec.name!r}: shape must begin with -1, the samples, and be positive: {spec.shape}"
            )


def _try(predicts: Predicts, model: nn.Module, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """What the outputs are, found by predicting from two samples of zeros."""
    zeros = two_zeros(inputs)
    try:
        with torch.inference_mode():
            outputs: Any = predicts.predict(model, zeros)
    except Exception as error:
        shapes = ", ".join(f"{spec.name}: {spec.datatype} {list(spec.shape)}" for spec in inputs)
        raise ConfigError(f"predict failed on zeros of the shapes that inputs() tells ({shapes}): {error!r}") from error
    if not isinstance(outputs, Mapping) or not outputs:
        raise ConfigError(f"predict must return tensors by name, not {type(outputs).__name__}")
    has_free = any(-1 in spec.shape[1:] for spec in inputs)
    return tuple(_output_spec(name, output, has_free) for name, output in outputs.items())


def two_zeros(specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Two samples that fit the specs; 32 where a shape is free beyond them."""
    return {
        spec.name: torch.zeros(
            2, *(FREE_SIZE if size == -1 else size for size in spec.shape[1:]), dtype=DTYPES[spec.datatype]
        )
        for spec in specs
    }


def _output_spec(name: str, output: Any, has_free: bool) -> TensorSpec:
    if not isinstance(output, Tensor) or output.shape[:1] != (2,):
        came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"output {name!r} must be a tensor whose first axis counts the samples, here 2, not {came}")
    rest = (-1 if has_free else size for size in output.shape[1:])
    return TensorSpec(name, datatype_of(output.dtype), (-1, *rest))
