"""What metrics ask of their inputs. Every refusal is a ``ConfigError`` that tells what was needed and what came."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.errors import ConfigError


def finite(name: str, values: Tensor) -> Tensor:
    """The values as they are, once none is NaN or infinite."""
    if values.is_complex():
        raise ConfigError(f"{name} must be real numbers, not {values.dtype}")
    if not bool(torch.isfinite(values).all()):
        raise ConfigError(f"{name} must be finite; {int((~torch.isfinite(values)).sum())} of {values.numel()} are not")
    return values


def real_array(name: str, values: Tensor) -> NDArray[np.float64]:
    """Finite numbers as a float64 array; exact for all float types, and for integers up to 2**53."""
    array: NDArray[np.float64] = finite(name, values.detach()).to("cpu", torch.float64).numpy()
    return array


def class_scores(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Finite scores (n, classes) and labels (n,) that name their columns, without grad, labels as int64."""
    if scores.ndim != 2 or not scores.is_floating_point() or scores.shape[1] == 0:
        raise ConfigError(f"scores must be floats of shape (samples, classes), not {described(scores)}")
    labels = class_numbers("labels", labels, len(scores), scores.shape[1])
    return finite("scores", scores.detach()), labels.to(scores.device)


def class_numbers(name: str, numbers: Tensor, num_samples: int, num_classes: int) -> Tensor:
    """Class numbers (num_samples,) as int64, each in 0..num_classes-1."""
    if numbers.ndim != 1 or len(numbers) != num_samples or numbers.is_floating_point() or numbers.is_complex():
        raise ConfigError(f"{name} must be class numbers of shape ({num_samples},), not {described(numbers)}")
    numbers = numbers.detach().long()
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_classes:
        span = f"{int(numbers.min())} to {int(numbers.max())}"
        raise ConfigError(f"{name} must lie in 0 to {num_classes - 1}; they span {span}")
    return numbers


def predicted_classes(outputs: Tensor, labels: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor, int]:
    """Predicted and true class numbers (n,) and how many classes there are.

    ``outputs``: scores (n, classes), of which the highest wins (the lower class among equals); or class numbers (n,)
    with ``num_classes``; or booleans (n,), which are two classes.
    """
    if outputs.ndim == 2:
        scores, labels = class_scores(outputs, labels)
        if num_classes not in (None, scores.shape[1]):
            raise ConfigError(f"num_classes is {num_classes}, and the scores have {scores.shape[1]} columns")
        return scores.argmax(dim=1), labels, scores.shape[1]
    if outputs.is_floating_point() or outputs.ndim != 1:
        raise ConfigError(
            "outputs must be scores of shape (samples, classes), or predicted class numbers of shape (samples,) such "
            f"as logits > 0; not {described(outputs)}"
        )
    if num_classes is None and outputs.dtype == torch.bool:
        num_classes = 2
    if num_classes is None:
        raise ConfigError("num_classes must be given with predicted class numbers, for a batch may lack some")
    predicted = class_numbers("predicted classes", outputs, len(outputs), num_classes)
    return predicted, class_numbers("labels", labels, len(outputs), num_classes).to(predicted.device), num_classes


def same_shape(predictions: Tensor, targets: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Predictions and targets as float64 arrays of one shape: nothing is broadcast."""
    if predictions.shape != targets.shape:
        came = f"{tuple(predictions.shape)} and {tuple(targets.shape)}"
        raise ConfigError(f"predictions and targets must have one shape; {came} came")
    return real_array("predictions", predictions), real_array("targets", targets)


def described(tensor: Tensor) -> str:
    """A tensor's type and shape, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
