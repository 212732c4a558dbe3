"""The model and the data on which Shoal and its peers recover: small, synthetic and the same everywhere.

Imported in every peer's environment, so it needs nothing but torch and NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.nn import functional as F

NUM_CLASSES = 10
SIDE = 28
LEARNING_RATE = 0.05
MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One epoch of training: ``num_steps`` global batches, dealt evenly to the ranks."""

    num_steps: int = 240
    global_batch: int = 288
    """Samples a step over all workers; a multiple of the number of workers."""
    checkpoint_every_steps: int = 25
    """About a second of work: far more often than users save, in favour of those who restart from a file."""
    seed: int = 0

    @property
    def num_samples(self) -> int:
        return self.num_steps * self.global_batch

    def write_data(self, folder: Path) -> None:
        """Write ``images.npy`` (num_samples, 28, 28) uint8 and ``labels.npy`` (num_samples,) int64 into the folder.

        Each class is a faint pattern under noise; 54 MB as it stands.
        """
        random = np.random.default_rng(self.seed)
        labels = random.integers(NUM_CLASSES, size=self.num_samples)
        patterns = random.integers(96, size=(NUM_CLASSES, SIDE, SIDE), dtype=np.uint8)
        shape = (self.num_samples, SIDE, SIDE)
        images = open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        for start in range(0, self.num_samples, self.global_batch):
            part = labels[start : start + self.global_batch]
            noise = random.integers(160, size=(len(part), SIDE, SIDE), dtype=np.uint8)
            images[start : start + self.global_batch] = patterns[part] + noise
        images.flush()
        np.save(folder / "labels.npy", labels)

    def read_data(self, folder: Path) -> tuple[Tensor, Tensor]:
        """The images, mapped from the file, and the labels: no time is spent on them before the first step."""
        images = np.load(folder / "images.npy", mmap_mode="c")
        return torch.from_numpy(images), torch.from_numpy(np.load(folder / "labels.npy"))

    def order(self) -> Tensor:
        """The epoch's sample ids (num_samples,), shuffled: the same in every process."""
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(self.seed))

    def share(self, order: Tensor, step: int, rank: int, world_size: int) -> Tensor:
        """The ids of one rank's part of the global batch of ``step``, which counts from 0."""
        size = self.global_batch // world_size
        start = step * self.global_batch + rank * size
        return order[start : start + size]

    def model(self) -> nn.Module:
        """A convolutional net of 0.41 million parameters, the same in every process."""
        torch.manual_seed(self.seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 256),
            nn.ReLU(),
            nn.Linear(256, NUM_CLASSES),
        )

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross entropy of uint8 images (n, 28, 28) and labels (n,), a scalar."""
        return F.cross_entropy(model(images.unsqueeze(1) / 128 - 1), labels)
