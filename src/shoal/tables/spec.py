"""What a table is asked to be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shoal.errors import ConfigError
from shoal.lanes.hashing import key_of
from shoal.tables.rules import RULES, Adagrad, Rule

NUM_BUCKETS = 4096
"""Ids fall into so many buckets by the last bits of their hash."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")
_WIDEST = 65_536


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table from any int64 id to a row of ``dim`` weights.

    ``initial_scale``: a row that was never stored is uniform in [-initial_scale, initial_scale), as a function of
    ``seed``, the table's name and the id alone. ``admit_after``: an id gets a row with its n-th push; before that it is
    counted, and its gradients are dropped. ``expire_after_s``: an id that was not pushed for so long, in event time, is
    removed by ``Table.expire``, in a run by its shards; None: never. ``dtype``: of the weights at rest; bfloat16 is
    rounded at random without bias, by a function of the id and the push. ``ConfigError`` for what cannot be.
    """

    name: str
    dim: int
    rule: Rule = field(default_factory=lambda: Adagrad(lr=0.05))
    initial_scale: float = 0.01
    seed: int = 0
    admit_after: int = 1
    expire_after_s: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"a table's name is letters, digits, '_', '.' and '-', at most 100, not {self.name!r}")
        if not 1 <= self.dim <= _WIDEST:
            raise ConfigError(f"table {self.name}: dim must be from 1 to {_WIDEST}, not {self.dim}")
        if not 0 <= self.initial_scale < float("inf"):
            raise ConfigError(f"table {self.name}: initial_scale must be a number from 0 on, not {self.initial_scale}")
        if not 1 <= self.admit_after < 1 << 30:
            raise ConfigError(f"table {self.name}: admit_after must be from 1 on, not {self.admit_after}")
        if self.expire_after_s is not None and self.expire_after_s < 1:
            raise ConfigError(f"table {self.name}: expire_after_s must be at least 1, not {self.expire_after_s}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"table {self.name}: dtype must be float32 or bfloat16, not {self.dtype!r}")
        if self.dtype == "bfloat16" and not self.rule.has_weights:
            raise ConfigError(f"table {self.name}: {type(self.rule).__name__} stores no weights; use float32 with it")

    @property
    def key(self) -> int:
        """What initial values are drawn by: 64 bits of seed and name."""
        return key_of(self.seed, *self.name.encode())

    @property
    def num_weight_words(self) -> int:
        """Words of 4 bytes that a row's weights take."""
        if not self.rule.has_weights:
            return 0
        return self.dim if self.dtype == "float32" else (self.dim + 1) // 2

    @property
    def num_words(self) -> int:
        """Words of 4 bytes that a row takes."""
        return self.num_weight_words + self.rule.num_slots(self.dim)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "rule": {"name": type(self.rule).__name__, **asdict(self.rule)}}  # type: ignore[call-overload]

    @staticmethod
    def read(record: Mapping[str, Any]) -> TableSpec:
        """What ``record`` made. ``ConfigError`` for a rule that there is not."""
        given = dict(record["rule"])
        name = given.pop("name")
        if name not in RULES:
            raise ConfigError(f"there is no row-wise optimizer {name!r}; there are {', '.join(RULES)}")
        return TableSpec(**{**record, "rule": RULES[name](**given)})
