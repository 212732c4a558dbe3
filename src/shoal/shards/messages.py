"""What a shard is asked, and what it answers: msgspec structs, in msgpack. Ids, rows and pushes are frames beside."""

from __future__ import annotations

from typing import Any

import msgspec


class _Message(msgspec.Struct, tag=True, frozen=True, array_like=True):
    pass


# Questions


class Pull(_Message, frozen=True):
    """Rows of a table for these ids (a frame of int64), as ``step`` may see them (-1: the newest). ``half``: as
    bfloat16."""

    epoch: int
    table: str
    step: int
    half: bool


class Push(_Message, frozen=True):
    """A push, which is the next frame. ``worker``: who has sent it, for messages."""

    epoch: int
    worker: str


class Begin(_Message, frozen=True):
    """A generation begins, from step ``base`` on."""

    generation: int
    base: int


class Open(_Message, frozen=True):
    """These tables are to be there: ``TableSpec.record`` of each."""

    specs: list[dict[str, Any]]


class Store(_Message, frozen=True):
    """Keep all of it as it is now."""


class Mark(_Message, frozen=True):
    """Remember how it stands at this step, and at those of ``keep``: a generation may begin there."""

    step: int
    keep: list[int]


class Ask(_Message, frozen=True):
    """How do you stand?"""


Question = Pull | Push | Begin | Open | Store | Mark | Ask


# Answers


class Rows(_Message, frozen=True):
    """(n, dim) rows, which are the next frame. ``staleness``: by how many steps the lane that was furthest behind was
    behind the step that asked."""

    dim: int
    half: bool
    staleness: int


class Taken(_Message, frozen=True):
    """What became of a push or a beginning: ``Verdict`` by its value."""

    verdict: str


class Refused(_Message, frozen=True):
    """It cannot be done. ``kind``: the error's name."""

    kind: str
    reason: str


class Moved(_Message, frozen=True):
    """The map of buckets is another one: nothing was done."""

    epoch: int
    shards: list[str]
    owner_of: bytes


class Standing(_Message, frozen=True):
    """How a shard stands."""

    shard: str
    step: int
    generation: int
    cursors: dict[int, int]
    figures: dict[str, Any]


class Done(_Message, frozen=True):
    """It has been done."""


Answer = Rows | Taken | Refused | Moved | Standing | Done
