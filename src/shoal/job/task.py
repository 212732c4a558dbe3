"""What a user writes about the model: a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from shoal.metrics import Metric

Batch = Any
"""What a source yields: a tuple of tensors, or a dict of them by column. The first axis counts samples."""


@runtime_checkable
class Task(Protocol):
    """A model, its loss and its metrics: three methods."""

    def model(self) -> nn.Module:
        """Build the model, on the CPU. Called once in every worker, after the seed is set."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over the batch's samples, a scalar. A mean: shares of unequal size are weighted by it."""
        ...

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Metric]:
        """This batch's metrics by name, such as ``{"accuracy": Accuracy.of(logits, labels)}``. Called without grad."""
        ...


@runtime_checkable
class Timed(Protocol):
    """A task whose samples have a time, by which rows of tables with ``expire_after_s`` expire."""

    def event_time_s(self, batch: Batch) -> int:
        """When the newest of a batch's samples happened, in whole seconds."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a served model.

    ``datatype`` is one of the Open Inference Protocol's (``FP32``, ``INT64``, ``UINT8``, ``BOOL``, …);
    ``shape`` counts the samples first, as -1.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@runtime_checkable
class Predicts(Protocol):
    """A task that says how it is served. One that does not is served as ``model(first tensor of a batch)``."""

    def inputs(self) -> Sequence[TensorSpec]:
        """What a request carries."""
        ...

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """From named inputs to named outputs, the first axis counting samples in both. Called without grad."""
        ...


@runtime_checkable
class GroupsParameters(Protocol):
    """A task whose parameters fall into groups for the optimizer, such as no decay for biases."""

    def parameter_groups(self, model: nn.Module) -> Sequence[dict[str, Any]]:
        """As ``torch.optim`` takes them: dicts with ``params`` and the group's own options."""
        ...
