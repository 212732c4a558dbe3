"""Fashion-MNIST by an MLP of 1.86 million parameters, as a job: the same task for every strategy and peer.

``ACCURACY_STRATEGY`` names one of ``SETTINGS``, ``ACCURACY_SEED`` the seed; ``ACCURACY_STEPS`` and
``ACCURACY_EVALUATE_EVERY_STEPS`` are for shorter runs. Whatever exchanges the gradients, the samples of a step, the
initial parameters and the schedule of the learning rate are the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import shoal
from benchmarks.machine import REPOSITORY
from shoal.codecs import Codec
from shoal.job.job import Balance
from shoal.metrics import Accuracy, LogLoss, Metric

DATA = REPOSITORY / "examples" / "data"
GLOBAL_BATCH = 96
STEPS, WARM_UP = int(os.environ.get("ACCURACY_STEPS", "1216")), 20
EVALUATE_EVERY_STEPS = int(os.environ.get("ACCURACY_EVALUATE_EVERY_STEPS", "64"))
LEARNING_RATE, MOMENTUM = 0.075, 0.9
WIDTH = 1024
SHORT = 600
"""Steps."""

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A strategy, and the inner optimizer that suits it."""

    strategy: shoal.AllReduce | shoal.LocalSGD | shoal.DiLoCo
    learning_rate: float = LEARNING_RATE
    momentum: float = MOMENTUM

    def optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        """``fused`` is torch's fastest on a CPU."""
        nesterov = self.momentum > 0
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, nesterov=nesterov, fused=True
        )  # fmt: skip


def local(every: int, codec: Codec, *, overlap: int = 0) -> Setting:
    """Momentum is the outer optimizer's here: that of each worker by itself would carry it away from the others. A
    short schedule, which has few rounds, wants larger steps, and a shorter memory that does not fade."""
    is_short = STEPS < SHORT
    learning_rate, momentum = (0.2, 0.8) if is_short else (0.13, 0.85)
    outer = shoal.Nesterov(lr=1.0, momentum=momentum, follows_rate=not is_short)
    strategy = shoal.DiLoCo(sync_every_steps=every, outer=outer, codec=codec, overlap_steps=overlap)
    return Setting(strategy=strategy, learning_rate=learning_rate, momentum=0.0)


SETTINGS: Mapping[str, Setting] = {
    "allreduce_fp32": Setting(strategy=shoal.AllReduce()),
    "allreduce_onebit": Setting(strategy=shoal.AllReduce(codec=shoal.OneBit())),
    "diloco_16_int4": local(16, shoal.Int4()),
    "diloco_16_int4_overlap": local(16, shoal.Int4(), overlap=4),
    "diloco_16_onebit": local(16, shoal.OneBit()),
}
"""What is compared, by name."""


class Clothes:
    """Ten classes; the MLP of ``benchmarks.loops``."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Images) -> Tensor:
        images, labels = batch
        return cross_entropy(model(scale(images)), labels)

    def metrics(self, model: nn.Module, batch: Images) -> Mapping[str, Metric]:
        images, labels = batch
        scores = model(scale(images))
        return {"accuracy": Accuracy.of(scores, labels), "log_loss": LogLoss.of(scores, labels)}


def scale(images: Tensor) -> Tensor:
    """From 0..255 to about zero mean and unit variance over the training images."""
    return (images.float() / 255 - 0.286) / 0.353


def arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    """``train`` or ``test``: images (n, 784) uint8 and labels (n,) int64."""
    rows: pa.Table = pq.read_table(DATA / f"{name}.parquet").combine_chunks()
    pixels = rows["image"].chunk(0)
    images = np.frombuffer(pixels.buffers()[1], np.uint8, len(rows) * 784, pixels.offset * 784)
    return images.reshape(-1, 784), rows["label"].to_numpy().astype(np.int64)


def warm_up_then_fall(step: int) -> float:
    """The learning rate's factor: up over the first steps, then down to nothing at the last."""
    return min(1.0, (step + 1) / WARM_UP) * (1 - step / STEPS)


setting = SETTINGS[os.environ.get("ACCURACY_STRATEGY", "allreduce_fp32")]
job = shoal.Job(
    task=Clothes(),
    train=shoal.Arrays(*arrays("train")),
    test=shoal.Arrays(*arrays("test")),
    optimizer=setting.optimizer,
    strategy=setting.strategy,
    schedule=warm_up_then_fall,
    global_batch=GLOBAL_BATCH,
    steps=STEPS,
    seed=int(os.environ.get("ACCURACY_SEED", "0")),
    evaluate_every_steps=EVALUATE_EVERY_STEPS,
    log_every_steps=EVALUATE_EVERY_STEPS,
    num_threads=1,
    storing=shoal.Storing(every_s=None),
    balance=Balance(enabled=False),
)
