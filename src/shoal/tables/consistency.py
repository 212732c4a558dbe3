"""How far workers may be apart: values that say when a read is answered, and when a push is applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from shoal.errors import ConfigError

Durability = Literal["snapshot", "log", "replica"]
"""Where a push is before it is acknowledged: on no disk before the next snapshot, on the shard's, or on a second
shard's too."""
_MOST_SHARDS = 1024
NOW = -1
"""A read of the newest, whichever step that is."""
ANYWHERE = -1
"""The base of a generation that goes on wherever each lane is: what has come of a step stays."""


@dataclass(frozen=True)
class Sync:
    """All lanes take a step together: what they push is summed and applied once all of it is there, and a read of a
    step sees all steps before it and nothing of its own. The order in which pushes come makes no difference."""


@dataclass(frozen=True)
class Bounded:
    """Stale-synchronous (Ho et al. 2013, "More Effective Distributed ML via a Stale Synchronous Parallel Parameter
    Server", section 3): a push is applied as it comes, and a read of step c waits until every lane has done c -
    ``steps`` steps."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"Bounded takes a number of steps from 0 on, not {self.steps}")


@dataclass(frozen=True)
class Async:
    """A push is applied as it comes, and a read is answered at once (Dean et al. 2012, "Large Scale Distributed Deep
    Networks", section 4.1). ``max_in_flight``: pushes that a worker may have sent and not seen acknowledged."""

    max_in_flight: int = 1

    def __post_init__(self) -> None:
        if self.max_in_flight < 1:
            raise ConfigError(f"Async takes max_in_flight from 1 on, not {self.max_in_flight}")


Consistency = Sync | Bounded | Async


def check_shards(shards: int, durability: Durability) -> None:
    """``ConfigError`` for shards that there cannot be."""
    if not 1 <= shards <= _MOST_SHARDS:
        raise ConfigError(f"shards must be from 1 to {_MOST_SHARDS}, not {shards}")
    if durability not in get_args(Durability):
        raise ConfigError(f"durability must be one of {', '.join(get_args(Durability))}, not {durability!r}")
    if durability == "replica" and shards < 2:
        raise ConfigError("durability='replica' needs shards=2 or more: each keeps a copy of another")
