"""Row-wise optimizers: how a row of a table takes a gradient, and what it keeps for the next one.

Each is a value. ``code`` and ``numbers`` are what the compiled loops know it by; ``num_slots`` is how many numbers a
row keeps besides its weights. All arithmetic is in float32, in the order that is written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from shoal.errors import ConfigError


class Rule(Protocol):
    """What a table needs of an optimizer."""

    @property
    def code(self) -> int:
        """Which of the compiled updates it is."""
        ...

    @property
    def numbers(self) -> tuple[float, ...]:
        """Its settings, in the order that the compiled update takes them."""
        ...

    @property
    def has_weights(self) -> bool:
        """Whether a row holds its weights; else they are derived from its slots."""
        ...

    @property
    def slot_start(self) -> float:
        """What a new row's slots hold."""
        ...

    def num_slots(self, dim: int) -> int:
        """Numbers that a row of ``dim`` weights keeps besides them."""
        ...


def _check(rule: object, *positive: str, least_0: tuple[str, ...] = ()) -> None:
    values = asdict(rule)  # type: ignore[call-overload]
    for name in positive:
        if not 0 < values[name] < float("inf"):
            raise ConfigError(f"{type(rule).__name__}: {name} must be a number above 0, not {values[name]}")
    for name in least_0:
        if not 0 <= values[name] < float("inf"):
            raise ConfigError(f"{type(rule).__name__}: {name} must be a number from 0 on, not {values[name]}")


@dataclass(frozen=True)
class SGD:
    """w -= lr g."""

    lr: float

    code = 0
    has_weights = True
    slot_start = 0.0

    def __post_init__(self) -> None:
        _check(self, "lr")

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.lr,)

    def num_slots(self, dim: int) -> int:
        return 0


@dataclass(frozen=True)
class Adagrad:
    """n += g^2; w -= lr g / (sqrt(n) + eps) (Duchi, Hazan and Singer 2011, JMLR 12). ``initial``: what n begins at."""

    lr: float
    eps: float = 1e-10
    initial: float = 0.0

    code = 1
    has_weights = True

    def __post_init__(self) -> None:
        _check(self, "lr", "eps", least_0=("initial",))

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.lr, self.eps)

    @property
    def slot_start(self) -> float:
        return self.initial

    def num_slots(self, dim: int) -> int:
        return dim


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, the end of section 2) with steps counted for each row, as powers of
    beta1 and beta2: a row that is seen for the first time is at its first step, however long others have been trained.
    What is not touched does not decay."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    code = 2
    has_weights = True
    slot_start = 0.0

    def __post_init__(self) -> None:
        _check(self, "lr", "eps", least_0=("beta1", "beta2"))
        if max(self.beta1, self.beta2) >= 1:
            raise ConfigError(f"Adam: beta1 and beta2 must be below 1, not {self.beta1} and {self.beta2}")

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.lr, self.beta1, self.beta2, self.eps)

    def num_slots(self, dim: int) -> int:
        return 2 * dim + 2


@dataclass(frozen=True)
class FTRL:
    """FTRL-Proximal by coordinate (McMahan et al. 2013, "Ad click prediction", Algorithm 1). A row holds z and n; its
    weights are derived from them when they are read, and are 0 where z is within ``l1`` of 0. A row begins at z = n =
    0, whatever the table's initial values."""

    alpha: float
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    code = 3
    has_weights = False
    slot_start = 0.0

    def __post_init__(self) -> None:
        _check(self, "alpha", least_0=("beta", "l1", "l2"))

    @property
    def numbers(self) -> tuple[float, ...]:
        return (self.alpha, self.beta, self.l1, self.l2)

    def num_slots(self, dim: int) -> int:
        return 2 * dim


RULES: Mapping[str, type[Any]] = {kind.__name__: kind for kind in (SGD, Adagrad, Adam, FTRL)}
"""By name."""
