"""What is done with an averaged outer gradient: the version's parameters less the mean of the workers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from shoal.errors import ConfigError

State = tuple[Tensor, ...]
"""Tensors like the parameters."""


@runtime_checkable
class Outer(Protocol):
    """An optimizer as a value. Neither method changes what it is given."""

    def init(self, parameters: Tensor) -> State:
        """The state before the first update of ``parameters`` (n,)."""
        ...

    def update(
        self, parameters: Tensor, gradient: Tensor, state: State, rate_change: float = 1.0
    ) -> tuple[Tensor, State]:
        """The next parameters (n,) and state, from the outer gradient (n,). ``rate_change``: the learning rate of this
        round's local steps over that of as many steps before them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Gradient descent. At ``lr=1`` the next version is the mean of the workers' parameters."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        _check_lr(self.lr)

    def init(self, parameters: Tensor) -> State:
        return ()

    def update(
        self, parameters: Tensor, gradient: Tensor, state: State, rate_change: float = 1.0
    ) -> tuple[Tensor, State]:
        return torch.sub(parameters, gradient, alpha=self.lr), ()


@dataclass(frozen=True, kw_only=True)
class Nesterov:
    """Nesterov momentum: buffer' = momentum * buffer + g; parameters' = parameters - lr * (g + momentum * buffer').

    DiLoCo's outer optimizer (Douillard et al. 2023, arXiv:2311.08105, Algorithm 1 and section 3), in torch's form of
    Sutskever et al. 2013. Those defaults are the paper's. Deviation, with ``follows_rate``: what earlier rounds moved
    by is scaled as the learning rate of the local steps has changed since (SlowMo, Wang et al. 2019, arXiv:1910.00643,
    Algorithm 1): else a falling rate ends with momentum from rounds whose rate was higher.
    """

    lr: float = 0.7
    momentum: float = 0.9
    follows_rate: bool = True

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be at least 0 and below 1, not {self.momentum}")

    def init(self, parameters: Tensor) -> State:
        return (torch.zeros_like(parameters),)

    def update(
        self, parameters: Tensor, gradient: Tensor, state: State, rate_change: float = 1.0
    ) -> tuple[Tensor, State]:
        kept = self.momentum * (rate_change if self.follows_rate else 1.0)
        buffer = torch.add(gradient, state[0], alpha=kept)
        step = torch.add(gradient, buffer, alpha=self.momentum)
        return torch.sub(parameters, step, alpha=self.lr), (buffer,)


def _check_lr(lr: float) -> None:
    if not lr > 0:
        raise ConfigError(f"the outer lr must be greater than 0, not {lr}")
