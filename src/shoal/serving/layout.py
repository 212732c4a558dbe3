"""How a model's convolutions lie in memory: channels last, where it answers the same so.

On a processor that is about twice as fast. After https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html,
"Use channels_last memory format for computer vision models".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from shoal.job.task import TensorSpec
from shoal.serving.datatypes import DTYPES

FREE_SIZE = 32
"""Of an axis of any size, where a model is tried."""
_TRIED = (1, 3)
"""Samples: with one, strides can be read both ways."""
_CLOSE = 1e-3

Predict = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def lay_out(model: nn.Module, predict: Predict, inputs: Sequence[TensorSpec]) -> None:
    """Have a model's 2-D convolutions compute channels last, unless that changes what ``predict`` answers, or fails as
    a ``view`` of what then lies otherwise does. Models on other devices are left as they are."""
    found = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not found or any(weight.device.type != "cpu" for weight in found):
        return
    trials = [{spec.name: _sample(spec, num) for spec in inputs} for num in _TRIED]
    expected = [_told(predict, trial) for trial in trials]
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not all(_is_same(_told(predict, trial), one) for trial, one in zip(trials, expected, strict=True)):
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _sample(spec: TensorSpec, num: int) -> Tensor:
    """Zeros, which are ids too; or numbers from 0 to 1, the same each time."""
    shape = (num, *(FREE_SIZE if size == -1 else size for size in spec.shape[1:]))
    dtype = DTYPES[spec.datatype]
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.rand(shape, generator=torch.Generator().manual_seed(num)).to(dtype)


def _told(predict: Predict, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    try:
        return {name: output.clone() for name, output in predict(inputs).items()}
    except Exception:  # noqa: BLE001 - it is asked again as it was, if it can be
        return None


def _is_same(found: Mapping[str, Tensor] | None, expected: Mapping[str, Tensor] | None) -> bool:
    return (
        found is not None
        and expected is not None
        and found.keys() == expected.keys()
        and all(_is_close(found[name], expected[name]) for name in expected)
    )


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    return torch.allclose(found.float(), expected.float(), rtol=_CLOSE, atol=_CLOSE)
