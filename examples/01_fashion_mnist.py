"""Clothes from pictures: a small convolutional network on all of Fashion-MNIST.

shoal train examples/01_fashion_mnist.py --workers 2
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import shoal
from shoal.metrics import Accuracy, LogLoss, Metric

DATA = Path(__file__).parent / "data"
EPOCHS, BATCH, TRAINING_IMAGES = 3, 256, 60_000
STEPS, WARM_UP = EPOCHS * math.ceil(TRAINING_IMAGES / BATCH), 50

Images = tuple[Tensor, Tensor]


def decode(rows: pa.Table) -> Images:
    """A row group's columns as images (n, 1, 28, 28) uint8 and labels (n,) int64."""
    pixels = rows["image"].combine_chunks()
    images = np.frombuffer(pixels.buffers()[1], np.uint8, len(rows) * 784, pixels.offset * 784)
    labels = rows["label"].to_numpy().astype(np.int64)
    return torch.from_numpy(images.reshape(-1, 1, 28, 28).copy()), torch.from_numpy(labels)


class Clothes:
    """Ten classes, 313,130 parameters."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(48 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Images) -> Tensor:
        images, labels = batch
        return cross_entropy(model(scale(images)), labels)

    def metrics(self, model: nn.Module, batch: Images) -> Mapping[str, Metric]:
        images, labels = batch
        scores = model(scale(images))
        return {"accuracy": Accuracy.of(scores, labels), "log_loss": LogLoss.of(scores, labels)}

    def inputs(self) -> Sequence[shoal.TensorSpec]:
        return [shoal.TensorSpec("image", "UINT8", (-1, 1, 28, 28))]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        probabilities = model(scale(inputs["image"])).softmax(1)
        return {"label": probabilities.argmax(1), "probabilities": probabilities}


def scale(images: Tensor) -> Tensor:
    """From 0..255 to about zero mean and unit variance over the training images."""
    return (images.float() / 255 - 0.286) / 0.353


def warm_up_then_fall(step: int) -> float:
    """The learning rate's factor: up over the first steps, then down to nothing at the last."""
    return min(1.0, (step + 1) / WARM_UP) * (1 - step / STEPS)


job = shoal.Job(
    task=Clothes(),
    train=shoal.Parquet(DATA / "train.parquet", decode=decode),
    test=shoal.Parquet(DATA / "test.parquet", decode=decode),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    schedule=warm_up_then_fall,
    global_batch=BATCH,
    epochs=EPOCHS,
    num_threads=1,
)
