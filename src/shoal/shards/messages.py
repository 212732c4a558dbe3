"""What a shard is asked, and what it answers: msgspec structs, in msgpack. Ids, rows and pushes are bodies beside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec


class Map(msgspec.Struct, frozen=True, array_like=True):
    """Which shard has which bucket (4096 int16), and where the shards are."""

    epoch: int
    shards: list[str]
    owner_of: bytes
    addresses: dict[str, str]


Kind = Literal["write", "whole", "done", "gone"]


class Change(msgspec.Struct, frozen=True, array_like=True):
    """``write``: bytes of a file, from ``at`` on; ``whole``: of one that is to take its place; ``done``: that takes its
    place, being of ``at`` bytes; ``gone``: it is gone."""

    file: str
    kind: Kind
    at: int
    num_bytes: int


class File(msgspec.Struct, frozen=True, array_like=True):
    """A file's length, and XXH3-64."""

    num_bytes: int
    sum: int


class _Message(msgspec.Struct, tag=True, frozen=True, array_like=True):
    pass


# Questions


class Pull(_Message, frozen=True):
    """Rows of a table for these ids (a frame of int64), as ``step`` may see them (-1: the newest). ``half``: as
    bfloat16. ``waits``: for a step whose pushes may still be on their way; else they have been acknowledged. ``early``:
    for the step after that."""

    epoch: int
    table: str
    step: int
    half: bool
    waits: bool
    early: bool = False


class Push(_Message, frozen=True):
    """A push, which is the next frame. ``worker``: who has sent it, for messages."""

    epoch: int
    worker: str


class Begin(_Message, frozen=True):
    """A generation begins, from step ``base`` on."""

    epoch: int
    generation: int
    base: int


class Open(_Message, frozen=True):
    """These tables are to be there: ``TableSpec.record`` of each."""

    specs: list[dict[str, Any]]


class Mark(_Message, frozen=True):
    """Remember how it stands at this step, and at those of ``keep``: a generation may begin there."""

    epoch: int
    step: int
    keep: list[int]


class HandOver(_Message, frozen=True):
    """What do you hold of these buckets (4096 bits), touched since an operation of each table?"""

    buckets: bytes
    since: dict[str, int]


class LetGo(_Message, frozen=True):
    """These buckets move as ``move``: give the last of them, and serve them no longer. The map is that from now on."""

    move: str
    buckets: bytes
    since: dict[str, int]
    map: Map


class TakeIn(_Message, frozen=True):
    """What ``HandOver`` gave, for ``move``; the first makes its journal anew. The entry is the next frame."""

    move: str
    first: bool


class TakeOver(_Message, frozen=True):
    """What ``LetGo`` gave for ``move``: serve these buckets. The body is the entry, then each push."""

    move: str
    buckets: bytes
    map: Map
    lengths: list[int]


class Forget(_Message, frozen=True):
    """Buckets that moved away as ``move``: the rows of these may go."""

    move: str
    buckets: bytes


class Use(_Message, frozen=True):
    """The map of buckets from now on."""

    map: Map


class Return(_Message, frozen=True):
    """Buckets have moved since ``step`` was marked: hold those of then, as they were. The map is that from now on."""

    step: int
    map: Map


class Look(_Message, frozen=True):
    """What do you keep of a shard's folder? With a ``term``: from now on for whom that is."""

    shard: str
    term: int


class Copy(_Message, frozen=True):
    """A shard has done this to its files, of which the bytes are the next frame; the ``number``-th of its term."""

    shard: str
    term: int
    number: int
    changes: Sequence[Change]


class Fetch(_Message, frozen=True):
    """What do you keep of a shard's file, from a byte on?"""

    shard: str
    file: str
    at: int


class Ask(_Message, frozen=True):
    """How do you stand?"""


Keep = Look | Copy | Fetch
Question = Pull | Push | Begin | Open | Mark | HandOver | LetGo | TakeIn | TakeOver | Forget | Use | Return | Keep | Ask


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

    map: Map


class Handed(_Message, frozen=True):
    """Buckets' rows. The body is an entry of a log and pushes, of these lengths; ``clocks``: the
    operation of each table that it is of."""

    lengths: list[int]
    clocks: dict[str, int]


class Standing(_Message, frozen=True):
    """How a shard stands. Of each of its journals ``books``: how many steps of each lane have come, and ``buckets``:
    which it has (4096 bits). ``maps``: which map was marked with which step; ``loads``: how much was asked lately of
    each bucket (4096 float32)."""

    shard: str
    step: int
    generation: int
    books: list[dict[int, int]]
    buckets: list[bytes]
    figures: dict[str, Any]
    map: Map
    specs: list[dict[str, Any]]
    maps: dict[int, Map]
    loads: bytes


class Listing(_Message, frozen=True):
    """The files that are kept of a shard's folder, for whom that was up to now."""

    term: int
    files: dict[str, File]


class Done(_Message, frozen=True):
    """It has been done. What was fetched is the next frame."""


Answer = Rows | Taken | Refused | Moved | Handed | Standing | Listing | Done
