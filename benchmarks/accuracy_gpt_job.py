"""A tiny GPT that predicts the next character, 0.8 million parameters, as a job.

``ACCURACY_STRATEGY`` names one of ``SETTINGS``. The text is ``TEXT``, which does not come with the project: Karpathy's
tiny Shakespeare, 1.1 MB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shoal
from benchmarks.machine import REPOSITORY
from shoal.job.job import Balance
from shoal.metrics import Metric

TEXT = REPOSITORY.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
GLOBAL_BATCH, STEPS, WARM_UP = 32, int(os.environ.get("ACCURACY_STEPS", "128")), 20
LENGTH, WIDTH, HEADS, LAYERS = 64, 128, 4, 4
EVERY_STEPS = 16

SETTINGS: Mapping[str, shoal.AllReduce | shoal.DiLoCo] = {
    "allreduce_fp32": shoal.AllReduce(),
    "allreduce_int8": shoal.AllReduce(codec=shoal.Int8()),
    "diloco_8_int4": shoal.DiLoCo(sync_every_steps=8, outer=shoal.Nesterov(lr=0.7, momentum=0.6), codec=shoal.Int4()),
}


class Gpt(nn.Module):
    """Embeddings, pre-norm causal transformer layers, a head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens) + self.places, mask=self.mask, is_causal=True))


def sequences() -> tuple[np.ndarray, int]:
    """(n, LENGTH + 1) int64, overlapping by one character, and how many characters there are."""
    text = np.frombuffer(TEXT.read_bytes(), np.uint8)
    characters, tokens = np.unique(text, return_inverse=True)
    starts = np.arange(0, len(tokens) - LENGTH - 1, LENGTH // 2)
    return tokens[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int64), len(characters)


rows, vocabulary = sequences()


class NextCharacter:
    """Mean cross entropy of each next character."""

    def model(self) -> nn.Module:
        return Gpt(vocabulary)

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        (tokens,) = batch
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def metrics(self, model: nn.Module, batch: tuple[Tensor]) -> Mapping[str, Metric]:
        return {}


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


def warm_up_then_fall(step: int) -> float:
    """The learning rate's factor."""
    return min(1.0, (step + 1) / WARM_UP) * (1 - step / STEPS)


job = shoal.Job(
    task=NextCharacter(),
    train=shoal.Arrays(rows),
    optimizer=adamw,
    strategy=SETTINGS[os.environ.get("ACCURACY_STRATEGY", "allreduce_fp32")],
    schedule=warm_up_then_fall,
    global_batch=GLOBAL_BATCH,
    steps=STEPS,
    log_every_steps=EVERY_STEPS,
    num_threads=1,
    storing=shoal.Storing(every_s=None),
    balance=Balance(enabled=False),
)
