"""The models that ``serve`` and ``overload`` serve, in plain PyTorch, with what requests carry and what is answered.

Imported in every peer's environment, so it needs nothing but torch, NumPy and safetensors.

python -m benchmarks.served_models NAME WEIGHTS: the milliseconds that the bare model takes for one sample, as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

NUM_USERS, NUM_FILMS, DIM, PAST = 100_000, 50_000, 16, 10
MOST_AT_ONCE = int(os.environ.get("SERVED_MOST_AT_ONCE", "64"))
"""Samples that go through a model together, at any peer."""

Row = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


def clothes() -> nn.Module:
    """The network of ``examples/01_fashion_mnist.py``."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def heavy() -> nn.Module:
    """One that computes for milliseconds, in which servers do not differ."""
    return nn.Sequential(
        nn.Conv2d(1, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 40, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(40, 80, 3, padding=1), nn.ReLU(), nn.Conv2d(80, 80, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(80 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


class Clicks(nn.Module):
    """Wide and deep, as in ``examples/06_film_clicks.py``, with torch's own tables."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(NUM_USERS, DIM)
        self.films = nn.EmbeddingBag(NUM_FILMS, DIM, mode="mean")
        self.wide = nn.EmbeddingBag(NUM_USERS + NUM_FILMS, 1, mode="sum")
        self.deep = deep()

    def forward(self, users: Tensor, films: Tensor, past: Tensor) -> Tensor:
        rows = torch.cat([self.users(users), self.films(films.unsqueeze(1)), self.films(past)], 1)
        found: Tensor = (self.deep(rows) + self.wide(torch.stack([users, films + NUM_USERS], 1))).squeeze(1)
        return found


def deep() -> nn.Module:
    """The dense half."""
    return nn.Sequential(nn.Linear(3 * DIM, 32), nn.ReLU(), nn.Linear(32, 1))


def of_an_image(model: nn.Module, inputs: Tensors) -> Tensors:
    """A class and the probabilities of all, from uint8 pixels."""
    probabilities = model((inputs["image"].float() / 255 - 0.286) / 0.353).softmax(1)
    return {"label": probabilities.argmax(1), "probabilities": probabilities}


def of_ids(model: nn.Module, inputs: Tensors) -> Tensors:
    """How probable a click is."""
    return {"probability": model(inputs["users"], inputs["films"], inputs["past"]).sigmoid()}


IMAGE = {"image": ("UINT8", (1, 28, 28))}
IDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "users": ("INT64", ()),
    "films": ("INT64", ()),
    "past": ("INT64", (PAST,)),
}
DTYPES = {"UINT8": np.uint8, "INT64": np.int64}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model, how it answers, and the datatype and shape of each of its inputs without the samples' axis."""

    build: Callable[[], nn.Module]
    answer: Callable[[nn.Module, Tensors], Tensors]
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]

    def sample(self) -> dict[str, Any]:
        """One request's, flat lists and numbers by name, as JSON has them."""
        random = np.random.default_rng(7)
        return {
            name: random.integers(256 if datatype == "UINT8" else NUM_FILMS, size=int(np.prod(shape))).tolist()
            if shape
            else int(random.integers(NUM_FILMS))
            for name, (datatype, shape) in self.inputs.items()
        }

    def width(self) -> int:
        """How many numbers a sample is."""
        return sum(int(np.prod(shape)) for _, shape in self.inputs.values())


KINDS: Mapping[str, Kind] = {
    "clothes": Kind(build=clothes, answer=of_an_image, inputs=IMAGE),
    "heavy": Kind(build=heavy, answer=of_an_image, inputs=IMAGE),
    "clicks": Kind(build=Clicks, answer=of_ids, inputs=IDS),
}


class Loaded:
    """A model in eval mode with its weights, on one thread."""

    def __init__(self, name: str, weights: str) -> None:
        torch.set_num_threads(1)
        self.kind = KINDS[name]
        self.model = self.kind.build().eval()
        self.model.load_state_dict(load_file(weights))

    def tensors(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Samples as requests carry them, side by side."""
        return {
            name: torch.from_numpy(np.array([row[name] for row in rows], DTYPES[datatype]).reshape(-1, *shape))
            for name, (datatype, shape) in self.kind.inputs.items()
        }

    def split(self, rows: np.ndarray) -> dict[str, Tensor]:
        """(n, width) numbers by input, for a server whose requests have but one."""
        found, start = {}, 0
        for name, (datatype, shape) in self.kind.inputs.items():
            end = start + int(np.prod(shape))
            column = np.ascontiguousarray(rows[:, start:end]).astype(DTYPES[datatype], copy=False)
            found[name], start = torch.from_numpy(column.reshape(-1, *shape)), end
        return found

    def predict(self, inputs: Tensors) -> Tensors:
        with torch.inference_mode():
            return self.kind.answer(self.model, inputs)

    def answer(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """For each sample what goes into its response."""
        columns = {name: out.tolist() for name, out in self.predict(self.tensors(rows)).items()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def main(name: str, weights: str) -> None:
    loaded = Loaded(name, weights)
    inputs = loaded.tensors([loaded.kind.sample()])
    times = []
    until_s = time.perf_counter() + 2
    while time.perf_counter() < until_s:
        begun_s = time.perf_counter()
        loaded.predict(inputs)
        times.append(time.perf_counter() - begun_s)
    print(json.dumps({"p50_ms": 1e3 * statistics.median(times[len(times) // 4 :])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
