"""Which shard has which bucket of ids: a value with an epoch. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError
from shoal.tables.spec import NUM_BUCKETS


@dataclass(frozen=True)
class BucketMap:
    """``owner_of[b]`` is the index in ``shards`` of the one that has bucket b. A change makes a map of the next
    ``epoch``."""

    epoch: int
    shards: tuple[str, ...]
    owner_of: tuple[int, ...]

    @staticmethod
    def even(shards: Sequence[str]) -> BucketMap:
        """As many buckets for each, side by side. ``ConfigError`` without a shard, or with more than buckets."""
        if not 1 <= len(set(shards)) == len(shards) <= NUM_BUCKETS:
            raise ConfigError(f"there must be from 1 to {NUM_BUCKETS} shards of different names, not {list(shards)}")
        return BucketMap(1, tuple(shards), tuple(b * len(shards) // NUM_BUCKETS for b in range(NUM_BUCKETS)))

    @cached_property
    def owners(self) -> npt.NDArray[np.int32]:
        """(4096,) indices."""
        return np.array(self.owner_of, np.int32)

    def buckets(self, shard: str) -> list[int]:
        """Those that a shard has."""
        index = self.shards.index(shard)
        return [bucket for bucket, owner in enumerate(self.owner_of) if owner == index]

    def moved(self, buckets: Sequence[int], to: str) -> BucketMap:
        """With these buckets elsewhere."""
        shards = self.shards if to in self.shards else (*self.shards, to)
        index, chosen = shards.index(to), set(buckets)
        owner_of = tuple(index if bucket in chosen else owner for bucket, owner in enumerate(self.owner_of))
        return BucketMap(self.epoch + 1, shards, owner_of)

    def without(self, shards: Sequence[str]) -> BucketMap:
        """Once shards have no buckets any more: of the others alone. ``ConfigError`` if one has."""
        kept = [name for name in self.shards if name not in shards]
        if any(self.buckets(name) for name in shards if name in self.shards):
            raise ConfigError(f"{', '.join(shards)} still have buckets: move them first")
        owner_of = tuple(kept.index(self.shards[owner]) for owner in self.owner_of)
        return BucketMap(self.epoch + 1, tuple(kept), owner_of)

    def moves_for(
        self, shards: Sequence[str], load: Mapping[int, float] | None = None
    ) -> dict[str, dict[str, list[int]]]:
        """What must move, from whom to whom, for these shards alone to have all, evenly: by ``load`` of each bucket,
        or else by number. Buckets of a shard that stays move only where it has too much."""
        weight = np.ones(NUM_BUCKETS) if load is None else np.array([load.get(b, 0.0) for b in range(NUM_BUCKETS)])
        weight = weight + weight.sum() / NUM_BUCKETS / 100 + 1e-12  # buckets that nobody asks for count a little
        own = {shard: float(weight[self.buckets(shard)].sum()) if shard in self.shards else 0.0 for shard in shards}
        fair, slack = float(weight.sum()) / len(shards), float(weight.mean()) / 2
        moves: dict[str, dict[str, list[int]]] = {}
        for source in sorted(self.shards, key=lambda shard: shard in own):  # those that leave come first
            for bucket in sorted(self.buckets(source), key=lambda bucket: (-weight[bucket], bucket)):
                to, cost = min(shards, key=lambda shard: (own[shard], shard)), float(weight[bucket])
                if source in own:
                    if own[source] - cost < max(own[to], fair - slack) or own[to] + cost > fair + slack:
                        continue
                    own[source] -= cost
                own[to] += cost
                moves.setdefault(source, {}).setdefault(to, []).append(bucket)
        return moves
