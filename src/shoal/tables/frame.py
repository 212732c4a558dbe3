"""A push as bytes: what a shard is sent is what its log holds.

uint32 length of the head, the head as msgpack, zeros up to a multiple of 8, then for each part its ids (int64) and its
gradients (float32), little-endian. A log holds the beginnings of generations, too.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError
from shoal.tables.book import Span

_LENGTH = struct.Struct("<I")
_ALIGNED = 8


class PartHead(msgspec.Struct, frozen=True, array_like=True):
    """How many ids of which table, and how wide their gradients are."""

    table: str
    num_ids: int
    dim: int


class Head(msgspec.Struct, frozen=True, array_like=True, tag="push"):
    """Whose work it is. ``now_s``: event time."""

    generation: int
    lanes: dict[int, tuple[int, int]]
    now_s: int
    parts: tuple[PartHead, ...]


class Begin(msgspec.Struct, frozen=True, array_like=True, tag="begin"):
    """A generation begins, from step ``base`` on: pushes of those before it are of no more use."""

    generation: int
    base: int

    def encode(self) -> list[bytes | memoryview]:
        return _encoded(self)


class Import(msgspec.Struct, frozen=True, array_like=True, tag="import"):
    """What another shard has handed over: images by table, as JSON and as safetensors, and at the end how its applier
    stands, as JSON; "" before."""

    metas: str
    arrays: bytes
    applier: str = ""

    def encode(self) -> list[bytes | memoryview]:
        return _encoded(self)


class Drop(msgspec.Struct, frozen=True, array_like=True, tag="drop"):
    """The ids of these buckets (4096 bits) are another shard's."""

    buckets: bytes

    def encode(self) -> list[bytes | memoryview]:
        return _encoded(self)


Entry = Begin | Import | Drop
_HEAD_DECODER = msgspec.msgpack.Decoder(Head | Entry)


def _encoded(entry: Entry) -> list[bytes | memoryview]:
    head = msgspec.msgpack.encode(entry)
    pieces = [_LENGTH.pack(len(head)), head, bytes(-(_LENGTH.size + len(head)) % _ALIGNED)]
    return [piece for piece in pieces if piece]


@dataclass(frozen=True)
class Part:
    """Gradients of one table's rows: (n,) distinct ids and (n, dim)."""

    table: str
    ids: npt.NDArray[np.int64]
    gradients: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Push:
    """The gradients of some lanes' samples, for some tables, applied together or not at all."""

    generation: int
    lanes: Mapping[int, Span]
    parts: Sequence[Part]
    now_s: int = 0

    def encode(self) -> list[bytes | memoryview]:
        """In pieces, without copying what is large."""
        heads = tuple(PartHead(p.table, len(p.ids), p.gradients.shape[1]) for p in self.parts)
        head = msgspec.msgpack.encode(Head(self.generation, dict(self.lanes), self.now_s, heads))
        padding = -(_LENGTH.size + len(head)) % _ALIGNED
        pieces: list[bytes | memoryview] = [_LENGTH.pack(len(head)), head, bytes(padding)]
        for part in self.parts:
            for array in (part.ids, part.gradients):
                pieces.append(bytes_of(array))
                pieces.append(bytes(-array.nbytes % _ALIGNED))
        return [piece for piece in pieces if len(piece)]


def decode(body: bytes | memoryview) -> Push | Entry:
    """The other way round; arrays are views of ``body``. ``ConfigError`` for what is none of these."""
    try:
        (length,) = _LENGTH.unpack_from(body)
        head = _HEAD_DECODER.decode(memoryview(body)[_LENGTH.size : _LENGTH.size + length])
        at = _LENGTH.size + length
        at += -at % _ALIGNED
        parts = []
        for part in head.parts if isinstance(head, Head) else ():
            ids, at = _array(body, at, np.int64, (part.num_ids,))
            gradients, at = _array(body, at, np.float32, (part.num_ids, part.dim))
            parts.append(Part(part.table, ids, gradients))
    except (struct.error, msgspec.MsgspecError, ValueError, OverflowError) as error:
        raise ConfigError(f"{len(body)} bytes are no push: {error}") from None
    if at != len(body):
        raise ConfigError(f"a push of {at} bytes came with {len(body)}")
    return Push(head.generation, head.lanes, parts, head.now_s) if isinstance(head, Head) else head


def bytes_of(array: npt.NDArray[Any]) -> memoryview:
    """An array's numbers, without a copy if they lie in order."""
    return memoryview(np.ascontiguousarray(array)).cast("B") if array.size else memoryview(b"")  # type: ignore[arg-type]


def _array(body: bytes | memoryview, at: int, dtype: Any, shape: tuple[int, ...]) -> tuple[npt.NDArray[Any], int]:
    if min(shape) < 0:
        raise ValueError(f"sizes of {shape} cannot be")
    count = math.prod(shape)
    array = np.frombuffer(body, dtype, count, at).reshape(shape)
    return array, at + array.nbytes + -array.nbytes % _ALIGNED
