"""What a shard's process is told to be."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.errors import ConfigError
from shoal.tables.consistency import Async, Bounded, Consistency, Durability, Sync

BEAT_S = 0.5
"""So often a shard's process says that it is alive."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard is to be. ``key_path`` "": without encryption. ``consistency``: as ``parse`` reads it. ``log_path``:
    where what it says goes from now on, if it is not to stay where it goes."""

    name: str
    folder: str
    shards: list[str]
    consistency: str = "async"
    num_lanes: int = 1
    durability: Durability = "log"
    memory_bytes: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    key_path: str = ""
    log_path: str = ""


class Peers(msgspec.Struct, frozen=True, kw_only=True):
    """Where the shards of a run are, and which of them keeps a copy of this one's folder."""

    addresses: dict[str, str]
    standby: str


def standby_of(name: str, shards: Sequence[str]) -> str:
    """The next one of them. It is on another host where shards are on hosts in turn."""
    return shards[(shards.index(name) + 1) % len(shards)]


def parse(text: str) -> Consistency:
    """``sync``, ``async`` or ``bounded:N``."""
    kind, _, number = text.partition(":")
    if kind == "bounded" and number.isdecimal():
        return Bounded(int(number))
    if text in ("sync", "async"):
        return Sync() if text == "sync" else Async()
    raise ConfigError(f"a consistency is sync, async or bounded:N, not {text!r}")
