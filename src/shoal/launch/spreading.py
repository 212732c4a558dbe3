"""Have a run's shards hold the buckets that they should, while they serve: in a thread of the driver's."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shoal.comm.keys import JobKey
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from shoal.tables.buckets import BucketMap

_PATIENCE_S = 60.0
_HOT = 1.5
_LEAST_ASKED = 10_000.0


class Spreading(threading.Thread):
    """``names`` are to hold all buckets, of all that are at ``addresses``. ``since``: the run is gone on with from that
    step, so first of all hold what was held then. ``by_load``: only if one of them is asked for half as much again as
    the mean, and then by that.

    Once it has ended ``error`` says what went wrong, ``is_torn`` whether that has left buckets with nobody, ``said``
    what there is to tell, ``is_done`` whether all is where it should be (without tables yet it is not), and ``marked``
    the newest step that may have been marked before that.
    """

    def __init__(
        self, key: JobKey, names: Sequence[str], addresses: Mapping[str, str], *, since: int | None = None,
        by_load: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(name="shoal-spreading", daemon=True)
        self.names = list(names)
        self.said: list[str] = []
        self.error: ShoalError | None = None
        self.is_done = self.is_torn = False
        self.marked = 0
        self._key = key
        self._addresses = dict(addresses)
        self._since = since
        self._by_load = by_load

    def run(self) -> None:
        try:
            self._spread()
        except ShoalError as error:
            from shoal.shards.moving import Torn

            self.error, self.is_torn = error, isinstance(error, Torn)

    def _spread(self) -> None:
        from shoal.shards.client import Client, Manner
        from shoal.shards.moving import loads_of, rebalance, settle, survey
        from shoal.tables.buckets import BucketMap

        there = list(self._addresses)
        client = Client(self._key, BucketMap.even(there), self._addresses, "driver", Manner(patience_s=_PATIENCE_S))
        try:
            if self._since is not None and settle(client, there, self._since, self._addresses):
                self.said.append(f"buckets had moved since step {self._since}: its shards have those of then again")
            standings = survey(client, there)
            if not any(standing.specs for standing in standings.values()):
                self.is_done = self._since is not None
                return
            loads = loads_of(standings) if self._by_load else None
            if loads is not None and not _is_hot(loads, client.buckets):
                self.is_done = True
                return
            moves = rebalance(client, self.names, self._addresses, loads)
            num_buckets, num_bytes = sum(move.num_buckets for move in moves), sum(move.num_bytes for move in moves)
            if moves:
                away_ms = 1000 * max(move.pause_s for move in moves)
                told = f"{num_buckets} buckets have moved ({num_bytes / 1e6:.1f} MB)"
                self.said.append(f"{told}; none was away for over {away_ms:.0f} ms")
            self.marked = max((step for one in survey(client, there).values() for step in one.maps), default=0)
            self.is_done = True
        finally:
            client.close()


def _is_hot(loads: Mapping[int, float], buckets: BucketMap) -> bool:
    """Whether a shard is asked for much more than the others."""
    own = [sum(loads[bucket] for bucket in buckets.buckets(shard)) for shard in buckets.shards]
    return len(own) > 1 and sum(own) > _LEAST_ASKED and max(own) > _HOT * sum(own) / len(own)
