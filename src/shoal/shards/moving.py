"""Buckets move from one shard to another while both serve: copied in parts, then what has changed since, then the rest
at once, with the books. Only that last part stops whoever needs these buckets, for milliseconds."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from shoal.comm.streams import Buffer
from shoal.errors import ConfigError, Fault, ShoalError, StoreFault
from shoal.shards import messages as msg
from shoal.shards.client import Client, map_of, told_of
from shoal.tables import TableSpec
from shoal.tables.buckets import BucketMap
from shoal.tables.spec import NUM_BUCKETS
from shoal.tables.stored import unpacked

_ROWS_A_PART = 20_000
_MOST_PARTS = 512
_SMALL_BYTES = 1 << 20
_MOST_ROUNDS = 5


class Torn(Fault):
    """A move was cut off when its source may have let go of the buckets, and before all knew who has them."""


@dataclass(frozen=True)
class Move:
    """Buckets that have moved. ``pause_s``: for so long nobody served them."""

    source: str
    to: str
    num_buckets: int
    num_bytes: int
    pause_s: float


def move(client: Client, buckets: Sequence[int], source: str, to: str, addresses: Mapping[str, str]) -> Move:
    """Have ``to`` serve these buckets of ``source``'s. ``addresses``: of all shards that will be in the map.

    They must be of one of its journals, and ``to`` must know the same tables. If this ends before its end the buckets
    are still ``source``'s, but for the last moment, in which a move of the same name would have to be made to its end.
    """
    if not set(buckets) <= set(client.buckets.buckets(source)):
        raise ConfigError(f"{source} does not have all of these buckets")
    packed, name, num_bytes = _packed(buckets), uuid.uuid4().hex[:12], 0
    num_parts = _parts(client, source, len(buckets))
    parts = [_packed(buckets[part::num_parts]) for part in range(num_parts)]
    since: dict[str, int] = {}
    for number, part in enumerate(parts):
        told, body = _handed(client, source, msg.HandOver(part, {}))
        since = since or told.clocks
        client.tell(to, msg.TakeIn(name, number == 0), body)
        num_bytes += len(body)
    for _ in range(_MOST_ROUNDS):
        told, body = _handed(client, source, msg.HandOver(packed, since))
        since = told.clocks
        client.tell(to, msg.TakeIn(name, False), body)
        num_bytes += len(body)
        if len(body) < _SMALL_BYTES:
            break
    changed = client.buckets.moved(buckets, to)
    begun_s = time.monotonic()
    try:
        told, body = _handed(client, source, msg.LetGo(name, packed, since, told_of(changed, addresses)))
        client.tell(to, msg.TakeOver(name, packed, told_of(changed, addresses), told.lengths), body)
        pause_s = time.monotonic() - begun_s
        use(client, changed, addresses)
    except ShoalError as error:
        raise Torn(f"a move of buckets from {source} to {to} was cut off in its last moment: {error}") from error
    for part in parts:
        client.tell(source, msg.Forget(name, part))
    return Move(source, to, len(buckets), num_bytes + len(body), pause_s)


def survey(client: Client, shards: Sequence[str]) -> dict[str, msg.Standing]:
    """Have a client that knows only where shards are know their newest map, and their tables: how each of them stands.
    Without tables yet, nobody has opened them."""
    found = {}
    for name in shards:
        standing, _ = client.tell(name, msg.Ask())
        assert isinstance(standing, msg.Standing)
        found[name] = standing
    client.buckets = map_of(max((standing.map for standing in found.values()), key=lambda told: told.epoch))
    specs = next((standing.specs for standing in found.values() if standing.specs), [])
    if specs:
        client.open([TableSpec.read(record) for record in specs])
    return found


def settle(client: Client, shards: Sequence[str], step: int, addresses: Mapping[str, str]) -> bool:
    """Have shards that are started again hold the buckets of step ``step``, if some have moved since, or were moving:
    whether they had. ``StoreFault`` if these do not make up all."""
    standings = survey(client, shards)
    marked = {name: standing.maps.get(step) for name, standing in standings.items()}
    told = next((one for one in marked.values() if one is not None), None)
    if told is None or all(standing.map.epoch == told.epoch for standing in standings.values()):
        return False
    missing = [name for name in told.shards if marked.get(name) is None]
    if missing:
        raise StoreFault(f"buckets have moved since step {step}, and {', '.join(missing)} does not have them any more")
    epoch = 1 + max(standing.map.epoch for standing in standings.values())
    then = msgspec.structs.replace(told, epoch=epoch, addresses=dict(addresses))
    for name in shards:
        client.tell(name, msg.Return(step, then))
    client.buckets = map_of(then)
    return True


def loads_of(standings: Mapping[str, msg.Standing]) -> dict[int, float]:
    """How much was asked lately of each bucket."""
    total = np.zeros(NUM_BUCKETS)
    for standing in standings.values():
        if standing.loads:
            total += np.frombuffer(standing.loads, np.float32)
    return dict(enumerate(total.tolist()))


def rebalance(
    client: Client, shards: Sequence[str], addresses: Mapping[str, str], loads: Mapping[int, float] | None = None
) -> list[Move]:
    """Have these shards alone hold all buckets, as many each, or as much of what is asked as ``loads`` has of each.
    Those that are new hold none yet; who leaves may end afterwards."""
    for name in set(shards) - set(client.buckets.shards):
        client.introduce(name, addresses[name])
    moves = []
    for source, targets in client.buckets.moves_for(shards, loads).items():
        for to, buckets in targets.items():
            for own in _by_journal(client, source, buckets):
                moves.append(move(client, own, source, to, addresses))
    gone = [name for name in client.buckets.shards if name not in shards]
    if gone:
        use(client, client.buckets.without(gone), {name: addresses[name] for name in shards})
    return moves


def use(client: Client, changed: BucketMap, addresses: Mapping[str, str]) -> None:
    """Tell every shard of a map, those that leave too."""
    names = {*client.buckets.shards, *changed.shards}
    for name in sorted(names):
        client.tell(name, msg.Use(told_of(changed, addresses)))
    client.buckets = changed


def _by_journal(client: Client, source: str, buckets: Sequence[int]) -> list[list[int]]:
    """Those that move together: buckets of one of the shard's journals."""
    masks = [unpacked(packed) for packed in client.standings()[source].buckets]
    groups = [[bucket for bucket in buckets if mask[bucket]] for mask in masks]
    return [group for group in groups if group]


def _parts(client: Client, source: str, num_buckets: int) -> int:
    figures = client.standings()[source].figures
    rows = sum(told["rows"] + told["waiting"] for key, told in figures.items() if key.startswith("table/"))
    own = rows * num_buckets / max(1, figures["buckets"])
    return max(1, min(_MOST_PARTS, num_buckets, -(-int(own) // _ROWS_A_PART)))


def _packed(buckets: Sequence[int]) -> bytes:
    """As 4096 bits."""
    mask = np.zeros(NUM_BUCKETS, np.bool_)
    mask[list(buckets)] = True
    return np.packbits(mask).tobytes()


def _handed(client: Client, source: str, question: msg.HandOver | msg.LetGo) -> tuple[msg.Handed, Buffer]:
    told, body = client.tell(source, question)
    assert isinstance(told, msg.Handed)
    return told, body
