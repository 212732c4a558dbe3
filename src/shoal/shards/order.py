"""What a shard's process is told to be."""

from __future__ import annotations

import msgspec

from shoal.errors import ConfigError
from shoal.tables.consistency import Async, Bounded, Consistency, Durability, Sync


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard is to be. ``key_path`` "": without encryption. ``consistency``: as ``parse`` reads it."""

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


def parse(text: str) -> Consistency:
    """``sync``, ``async`` or ``bounded:N``."""
    kind, _, number = text.partition(":")
    if kind == "bounded" and number.isdecimal():
        return Bounded(int(number))
    if text in ("sync", "async"):
        return Sync() if text == "sync" else Async()
    raise ConfigError(f"a consistency is sync, async or bounded:N, not {text!r}")
