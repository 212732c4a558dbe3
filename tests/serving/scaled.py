"""A small task that is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from shoal.job import Batch, TensorSpec
from shoal.metrics import Metric


class Scaled:
    """Scores of two inputs: a row of three floats, times a whole number."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.predict(model, batch)["scores"].mean()

    def metrics(self, model: nn.Module, batch: Batch) -> Mapping[str, Metric]:
        return {}

    def inputs(self) -> Sequence[TensorSpec]:
        return [TensorSpec("row", "FP32", (-1, 3)), TensorSpec("times", "INT64", (-1,))]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        scores = model(inputs["row"]) * inputs["times"][:, None]
        return {"scores": scores, "best": scores.argmax(dim=1)}
