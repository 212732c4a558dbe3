"""A model that trains in milliseconds, and stores that fail on purpose."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shoal.errors import StoreFault
from shoal.versions import Snapshot, Store, Versions, capture, fingerprint


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def snapshot_at(step: int, value: float | None = None) -> Snapshot:
    """A snapshot that is told apart from others by ``value``, which is the step unless given."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step if value is None else value)
    train_nothing: Tensor = model(torch.zeros(1, 2)).sum() * 0
    train_nothing.backward()
    optimizer.step()
    return capture(model, optimizer, step, {"fingerprint": fingerprint(model, optimizer), "cursors": [step] * 4})


class Failing(Store):
    """A store in which the operation of number ``fails_at``, counted from 0, fails: before or after it is done."""

    def __init__(self, url: str, fails_at: int, *, done: bool) -> None:
        super().__init__(url)
        self._fails_at = fails_at
        self._done = done
        self.num_operations = 0

    def _do(self, verb, name, action):  # type: ignore[no-untyped-def]
        number = self.num_operations
        self.num_operations += 1
        if number == self._fails_at:
            if self._done:
                super()._do(verb, name, action)
            raise StoreFault(f"operation {number}, {verb} {name}, was made to fail")
        return super()._do(verb, name, action)


def versions_in(path: object, keep_last: int = 3, keep_every_steps: int | None = None) -> Versions:
    return Versions(Store(str(path)), keep_last, keep_every_steps)
