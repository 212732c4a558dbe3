"""Convolutions are laid out for speed only where the model answers the same."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from shoal.job import TensorSpec
from shoal.serving.layout import lay_out

IMAGE = TensorSpec("image", "FP32", (-1, 2, 8, 8))


class Network(nn.Module):
    """A convolution, and its outputs one after another: how, is said."""

    def __init__(self, flat: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.last = nn.Linear(256, 3)
        self.flat = flat

    def forward(self, image: Tensor) -> Tensor:
        found = self.conv(image)
        if self.flat == "view":
            found = found.view(len(image), -1)
        elif self.flat == "strided":
            found = torch.as_strided(found, (len(image), 256), (256, 1))
        else:
            found = found.flatten(1)
        outputs: Tensor = self.last(found)
        return outputs


def predict_with(model: nn.Module) -> object:
    def predict(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.inference_mode():
            return {"out": model(inputs["image"])}

    return predict


@pytest.mark.parametrize(("flat", "is_last"), [("flatten", True), ("view", False), ("strided", False)])
def test_channels_are_last_where_the_answer_stays(flat: str, is_last: bool) -> None:
    torch.manual_seed(0)
    model = Network(flat).eval()
    predict = predict_with(model)
    image = torch.rand(5, 2, 8, 8)
    expected = predict({"image": image})["out"]  # type: ignore[operator]
    lay_out(model, predict, [IMAGE])  # type: ignore[arg-type]
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last) == is_last
    assert model.conv.weight.is_contiguous() != is_last
    torch.testing.assert_close(predict({"image": image})["out"], expected, rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def test_a_model_without_convolutions_is_not_even_tried() -> None:
    def predict(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise AssertionError("it was tried")

    lay_out(nn.Sequential(nn.Linear(2, 2)), predict, [IMAGE])
