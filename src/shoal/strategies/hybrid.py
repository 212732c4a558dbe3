"""Tables in shards, and dense parameters with the workers: for recommenders, whose models are mostly tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from shoal.codecs import Codec
from shoal.errors import ConfigError
from shoal.strategies.allreduce import AllReduce, Reducer
from shoal.tables.consistency import Durability, check_shards


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Every step is one for all: gradients of dense parameters are averaged by ``dense``, and those of the rows of
    ``shoal.Embedding`` modules are summed and applied by ``shards`` processes that hold them. Tables and parameters are
    of one version: a step is committed with both, or done again with both.

    ``durability``: ``log``: a shard that is killed loses nothing; ``replica``: nor does one whose host is lost;
    ``snapshot``: the run goes back to the version that was stored last. ``half``: rows travel as bfloat16.
    """

    dense: AllReduce = field(default_factory=AllReduce)
    shards: int = 1
    durability: Durability = "log"
    half: bool = False

    def __post_init__(self) -> None:
        check_shards(self.shards, self.durability)
        if self.dense.delay:
            raise ConfigError("with delay=1 dense parameters and tables would not be of one version; use delay=0")

    @property
    def codec(self) -> Codec | None:
        """That of the dense gradients."""
        return self.dense.codec

    def bind(self, model: nn.Module) -> Reducer:
        """The exchange of the dense part."""
        return self.dense.bind(model)
