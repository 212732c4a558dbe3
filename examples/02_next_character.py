"""The next character of a text: a small transformer on this project's licence.

shoal train examples/02_next_character.py --workers 2
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import shoal
from shoal.metrics import Accuracy, LogLoss, Metric

CONTEXT, WIDTH, NUM_CODES = 32, 64, 128


def windows(codes: np.ndarray, stride: int) -> np.ndarray:
    """Pieces of CONTEXT characters and the one after: (n, CONTEXT + 1) int64."""
    return np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)[::stride].copy()


class Predictor(nn.Module):
    """A causal transformer: codes (n, CONTEXT) to scores of what comes next at each place (n, CONTEXT, NUM_CODES)."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(NUM_CODES, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.scores = nn.Linear(WIDTH, NUM_CODES)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        hidden = self.letters(codes) + self.places
        scores: Tensor = self.scores(self.layers(hidden, mask=self.mask, is_causal=True))
        return scores


class NextCharacter:
    """A sample is a piece of text; every place in it is predicted from what stands before."""

    def model(self) -> nn.Module:
        return Predictor()

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return cross_entropy(*scores_and_targets(model, batch))

    def metrics(self, model: nn.Module, batch: tuple[Tensor]) -> Mapping[str, Metric]:
        scores, targets = scores_and_targets(model, batch)
        return {"accuracy": Accuracy.of(scores, targets), "nats_a_character": LogLoss.of(scores, targets)}


def scores_and_targets(model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, Tensor]:
    """For every place of every piece: the scores and the character that followed."""
    (pieces,) = batch
    return model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten()


text = (Path(__file__).parent.parent / "LICENSE").read_bytes()
codes = np.frombuffer(text, np.uint8).astype(np.int64)
start, stop = len(codes) // 2, len(codes) * 6 // 10  # held out: a tenth, from the middle

job = shoal.Job(
    task=NextCharacter(),
    train=shoal.Arrays(np.concatenate([windows(codes[:start], stride=2), windows(codes[stop:], stride=2)])),
    test=shoal.Arrays(windows(codes[start:stop], stride=CONTEXT)),
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    clip_norm=1.0,
    global_batch=64,
    epochs=3,
    num_threads=1,
)
