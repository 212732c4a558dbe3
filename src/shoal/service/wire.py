"""What a service and its model processes tell each other, over a socket that both were born with.

A frame: lengths of head and tail (little-endian uint32 and uint64), the head in msgpack, then arrays' bytes one after
another. Questions are answered in their order, so nothing is numbered.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import numpy as np

from shoal.errors import Bug
from shoal.job.task import TensorSpec
from shoal.serving.batching import Lost
from shoal.serving.datatypes import ARRAY_DTYPES, Array, Arrays, datatype_of_array

_LENGTHS = struct.Struct("<IQ")
_SMALL_BYTES = 1 << 16
_NO_ARRAYS: Arrays = {}


class Source(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a model is: a version of a run, or a package with its task's job file, and whose signature it must bear."""

    path: str
    version: int | None = None
    job_file: str | None = None
    signed_by: str | None = None


class Load(msgspec.Struct, frozen=True, tag=True):
    """Have this model answer from now on. ``num_threads``: torch's. The others: as ``Batching``."""

    source: Source
    num_threads: int
    max_samples: int
    max_batch_s: float


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Get ready for versions from where this one is."""

    source: Source


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """It does. The arrays are a probe: of training samples ``input/NAME`` as requests carry them, and ``output/NAME``
    as the model answers them. ``by_delta``: of its tables only what is new was read. ``stored_s``: when the version was
    stored (wall time), if that is known."""

    name: str
    version: int
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    by_delta: bool = False
    stored_s: float | None = None


class Compute(msgspec.Struct, frozen=True, tag=True):
    """The arrays are inputs by name."""


class Computed(msgspec.Struct, frozen=True, tag=True):
    """The arrays are outputs by name. ``took_s``: to compute them."""

    took_s: float


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Evaluate the model on the job's test data."""


class Measured(msgspec.Struct, frozen=True, tag=True):
    """Metrics by name; none if the job has no test data."""

    figures: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """What was asked could not be done; the process goes on. ``is_config``: it is the asker's to mend."""

    reason: str
    is_config: bool = False


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The process has begun, or is prepared, and has no model yet."""


Message = Load | Prepare | Loaded | Compute | Computed | Measure | Measured | Failed | Ready


class _Described(msgspec.Struct, frozen=True, array_like=True):
    name: str
    datatype: str
    shape: Sequence[int]


class _Head(msgspec.Struct, frozen=True, array_like=True):
    message: Message
    arrays: list[_Described]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Head)


Frame = list[bytes | memoryview]
"""In parts, to be sent one after another."""


def pack(message: Message, arrays: Arrays = _NO_ARRAYS) -> Frame:
    """What to send. ``ConfigError`` for an array of a dtype that the protocol does not have."""
    described = [_Described(name, datatype_of_array(array), array.shape) for name, array in arrays.items()]
    tails = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays.values() if array.size]
    head = _encoder.encode(_Head(message, described))
    return [_LENGTHS.pack(len(head), sum(len(tail) for tail in tails)) + head, *tails]


def unpack(head: bytes | bytearray, tail: bytearray) -> tuple[Message, dict[str, Array]]:
    """What a frame says. The arrays lie in ``tail``, but for those that would not be aligned there."""
    found = _decoder.decode(head)
    arrays, at = {}, 0
    for one in found.arrays:
        dtype, num = ARRAY_DTYPES[one.datatype], math.prod(one.shape)
        flat = np.frombuffer(tail, dtype, num, at) if num else np.empty(0, dtype)
        at += flat.nbytes
        arrays[one.name] = np.require(flat, requirements="A").reshape(one.shape)
    return found.message, arrays


class Wire:
    """The end of a model process, which waits for one thing at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def receive(self) -> tuple[Message, dict[str, Array]] | None:
        """The next question; None once the service has gone."""
        lengths = self._read(_LENGTHS.size)
        if lengths is None:
            return None
        head_bytes, tail_bytes = _LENGTHS.unpack(lengths)
        head, tail = self._read(head_bytes), self._read(tail_bytes)
        return None if head is None or tail is None else unpack(head, tail)

    def _read(self, num_bytes: int) -> bytearray | None:
        data = bytearray(num_bytes)
        view, at = memoryview(data), 0
        while at < num_bytes:
            came = self._end.recv_into(view[at:])
            if not came:
                return None
            at += came
        return data

    def send(self, frame: Frame) -> None:
        """Tell an answer."""
        if len(frame) > 1 and sum(len(part) for part in frame) < _SMALL_BYTES:
            frame = [b"".join(frame)]
        for part in frame:
            self._end.sendall(part)


Outcome = tuple[Message, dict[str, Array]]


class Link(asyncio.Protocol):
    """The service's end: asks, and matches answers to questions. What is asked when the process has ended, or was
    when it did, fails with ``Lost``."""

    def __init__(self) -> None:
        self._asked: deque[asyncio.Future[Outcome]] = deque()
        self._data = bytearray()
        self._transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def ask(self, message: Message, arrays: Arrays = _NO_ARRAYS) -> asyncio.Future[Outcome]:
        """Ask at once."""
        future = self.expect()
        if self._transport is None or self._transport.is_closing():
            self._asked.pop()
            future.set_exception(Lost("the model's process has ended"))
        else:
            self._transport.writelines(pack(message, arrays))
        return future

    @property
    def num_asked(self) -> int:
        """Questions that are not answered yet."""
        return len(self._asked)

    def expect(self) -> asyncio.Future[Outcome]:
        """What will be told next without being asked."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        return future

    def data_received(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= _LENGTHS.size:
            head_bytes, tail_bytes = _LENGTHS.unpack_from(self._data)
            body = _LENGTHS.size + head_bytes
            if len(self._data) < body + tail_bytes:
                return
            head, tail = bytes(self._data[_LENGTHS.size : body]), self._data[body : body + tail_bytes]
            del self._data[: body + tail_bytes]
            self._told(*unpack(head, tail))

    def _told(self, message: Message, arrays: dict[str, Array]) -> None:
        if not self._asked:
            raise Bug(f"a model's process told {type(message).__name__} without being asked")
        future = self._asked.popleft()
        if not future.done():
            future.set_result((message, arrays))

    def connection_lost(self, error: Exception | None) -> None:
        while self._asked:
            future = self._asked.popleft()
            if not future.done():
                future.set_exception(Lost("the model's process has ended"))
        if not self.closed.done():
            self.closed.set_result(None)

    def close(self) -> None:
        """Have the process see that nothing more comes."""
        if self._transport is not None:
            self._transport.close()


def specs(told: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """As a predictor has them."""
    return tuple(TensorSpec(spec.name, spec.datatype, tuple(spec.shape)) for spec in told)
