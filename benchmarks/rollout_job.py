"""Clothes from pictures, as in examples/01_fashion_mnist.py but small; and a version may be one that ends its process.

A version whose buffer ``deadly`` is 1 does so when it is loaded: a stand-in for what takes a server down with it, such
as a broken kernel or too little memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import shoal
from shoal.metrics import Accuracy, Metric

DATA = Path(__file__).parent.parent / "examples" / "data"
TRAINED, TESTED = 12_000, 2_000


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        self.register_buffer("deadly", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 255)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        if float(state_dict["deadly"]) == 1:
            os._exit(9)
        return super().load_state_dict(state_dict, strict, assign)


class Clothes:
    def model(self) -> nn.Module:
        return Net()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Metric]:
        return {"accuracy": Accuracy.of(model(batch[0]), batch[1])}

    def inputs(self) -> Sequence[shoal.TensorSpec]:
        return [shoal.TensorSpec("image", "UINT8", (-1, 28, 28))]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"label": model(inputs["image"]).argmax(1)}


def read(name: str, most: int) -> shoal.Arrays:
    rows = pq.read_table(DATA / f"{name}.parquet").slice(0, most).combine_chunks()
    column = rows["image"].chunk(0)
    pixels = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * 784 :][: len(rows) * 784]
    return shoal.Arrays(pixels.reshape(-1, 28, 28).copy(), rows["label"].to_numpy().astype(np.int64))


job = shoal.Job(
    task=Clothes(),
    train=read("train", TRAINED),
    test=read("test", TESTED),
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    global_batch=128,
    epochs=1,
    num_threads=1,
)
