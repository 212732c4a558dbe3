"""State from peer to peer: a worker offers named tensors, a newcomer fetches them in chunks.

Each transfer runs over its own encrypted connection, so bulk never stands before a heartbeat in one queue, and a
fetcher asks for a few chunks ahead, so a slow one holds no more than those in the offerer's memory.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import zmq
from torch import Tensor

from shoal.comm.doorkeeper import Doorkeeper
from shoal.comm.keys import JobKey
from shoal.comm.link import bound_address
from shoal.errors import ConfigError, Halted, LinkFault

_CHUNK_BYTES = 1 << 20
_AHEAD = 4
_LAST_OFFERS = 2


@dataclass(frozen=True)
class Parcel:
    """Named CPU tensors and what is to be known of them (JSON)."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]


class _Entry(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: list[int]
    num_bytes: int


class _Header(msgspec.Struct, frozen=True):
    entries: list[_Entry]
    meta: dict[str, Any]


class _Ask(msgspec.Struct, frozen=True):
    """A parcel's header (``index`` -1) or one chunk of its tensors."""

    name: str
    index: int = -1
    offset: int = 0


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


class Offerer:
    """Serve parcels from a thread of its own. The last two offered are kept; an earlier ask waits for its parcel."""

    def __init__(self, host: str, key: JobKey) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._doorkeeper = Doorkeeper(self._context, key)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        key.listen(self._socket)
        try:
            self._socket.bind(f"tcp://{host}:0")
        except zmq.ZMQError as error:
            self._doorkeeper.close()
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot listen on {host}: {error}; it must be an address of this host") from error
        self.address = bound_address(self._socket)
        self._offers: dict[str, tuple[_Header, list[memoryview]]] = {}
        self._waiting: deque[list[bytes]] = deque(maxlen=1000)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="shoal-offerer", daemon=True)
        self._thread.start()

    def offer(self, name: str, parcel: Parcel) -> None:
        """Keep ``parcel`` for whoever asks; its tensors must not change any more."""
        views = [_bytes_of(tensor) for tensor in parcel.tensors.values()]
        entries = [
            _Entry(key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), len(view))
            for (key, tensor), view in zip(parcel.tensors.items(), views, strict=True)
        ]
        offers = dict(list(self._offers.items())[-(_LAST_OFFERS - 1) :])
        offers[name] = (_Header(entries, dict(parcel.meta)), views)
        self._offers = offers

    def _serve(self) -> None:
        while not self._closing.is_set():
            for _ in range(len(self._waiting)):
                self._answer(self._waiting.popleft())
            if self._socket.poll(5 if self._waiting else 50):
                self._answer(self._socket.recv_multipart())
        self._socket.close()

    def _answer(self, frames: list[bytes]) -> None:
        try:
            ask = msgspec.msgpack.decode(frames[-1], type=_Ask)
        except msgspec.MsgspecError:
            return
        offer = self._offers.get(ask.name)
        if offer is None:
            self._waiting.append(frames)
            return
        header, views = offer
        if ask.index >= len(views):
            return
        if ask.index < 0:
            reply: bytes | memoryview = msgspec.msgpack.encode(header)
        else:
            reply = views[ask.index][ask.offset : ask.offset + _CHUNK_BYTES]
        self._socket.send_multipart([frames[0], reply], copy=False)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._doorkeeper.close()
        self._context.term()


def fetch(
    address: str, key: JobKey, name: str, timeout_s: float, cancelled: Callable[[], bool] = lambda: False
) -> Parcel:
    """Copy a parcel from a peer. ``LinkFault`` if nothing comes for ``timeout_s``; ``Halted`` once ``cancelled()``."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    key.call(socket)
    socket.connect(f"tcp://{address}")
    try:
        return _Fetch(socket, address, timeout_s, cancelled).run(name)
    finally:
        socket.close()
        context.term()


@dataclass(frozen=True)
class _Fetch:
    socket: zmq.Socket[bytes]
    address: str
    timeout_s: float
    cancelled: Callable[[], bool]

    def run(self, name: str) -> Parcel:
        self._ask(_Ask(name))
        header = msgspec.msgpack.decode(self._receive(), type=_Header)
        tensors = {entry.name: _empty(entry) for entry in header.entries}
        views = [_bytes_of(tensor) for tensor in tensors.values()]
        chunks = [
            _Ask(name, index, offset)
            for index, entry in enumerate(header.entries)
            for offset in range(0, entry.num_bytes, _CHUNK_BYTES)
        ]
        for chunk in chunks[:_AHEAD]:
            self._ask(chunk)
        for position, chunk in enumerate(chunks):
            data = self._receive()
            views[chunk.index][chunk.offset : chunk.offset + len(data)] = data
            if position + _AHEAD < len(chunks):
                self._ask(chunks[position + _AHEAD])
        return Parcel(tensors, header.meta)

    def _ask(self, ask: _Ask) -> None:
        self.socket.send(msgspec.msgpack.encode(ask))

    def _receive(self) -> memoryview:
        deadline_s = time.monotonic() + self.timeout_s
        while not self.socket.poll(20):
            if self.cancelled():
                raise Halted("the copy is of no more use: the generation has ended")
            if time.monotonic() > deadline_s:
                raise LinkFault(f"{self.address} sent nothing for {self.timeout_s:g} s; is it cut off or frozen?")
        return self.socket.recv(copy=False).buffer


def _empty(entry: _Entry) -> Tensor:
    return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
