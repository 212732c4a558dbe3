"""Messages over TCP, with a key encrypted wherever they leave this machine: what ``comm.calls`` is made of.

A message is a number, a head and a body. Whoever waits for one sends, receives and encrypts meanwhile, so an answer
wakes one thread on each side, and none besides. A helper does so for what is large while nobody waits.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from shoal.comm.sealing import Seal, Sealer
from shoal.errors import ConfigError

Buffer = bytes | memoryview
Taken = tuple[int, memoryview, memoryview]
"""A message as it came: its number, head and body. They are the receiver's own."""

_PREFIX = struct.Struct("<4sIQQ")  # a mark, the head's length, the body's, and the number
_MARK = b"shl1"
_SPIN_S = 0.001 if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1 else 0.0
"""On a single core whoever would answer waits meanwhile."""
_LARGEST_HEAD, _ALIGNED = 1 << 26, 64
_SCRATCH_BYTES, _SMALL_BYTES = 1 << 16, 1 << 16
_SLICE_BYTES = 1 << 18
_TOGETHER_BELOW = 1 << 16
_HELP_S = 0.001
_IDLE_S, _PROBE_S, _NUM_PROBES, _UNHEARD_MS = 10, 5, 3, 60_000

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Loop:
    """Waits for many sockets at once. Who has to do with them holds ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self.room = memoryview(bytearray(_SLICE_BYTES))
        """For what is on its way from a socket; nothing stays there."""
        self._stirred_s = 0.0
        self._goes_on: list[Callable[[], bool]] = []
        self._wanted, self._closed = threading.Event(), False
        self._helper: threading.Thread | None = None

    def turn(self, timeout_s: float) -> bool:
        """Let what is ready go on; whether anything was. For a moment after something has come or was sent it looks
        again and again before it sleeps, and gives way to whoever wants the core: to be woken takes as long as many an
        answer, above all on a virtual machine."""
        with self.lock:
            return self._turn(timeout_s)

    def _turn(self, timeout_s: float) -> bool:
        ready = self._selector.select(0.0)
        asleep_at_s = min(self._stirred_s + _SPIN_S, time.monotonic() + timeout_s)
        while not ready and time.monotonic() < asleep_at_s:
            os.sched_yield()  # whoever has something to do on this core goes first
            ready = self._selector.select(0.0)
        if not ready and timeout_s > 0:
            ready = self._selector.select(timeout_s)
        for key, events in ready:
            key.data(events)
        if ready:
            self.stir()
        return bool(ready)

    def stir(self) -> None:
        """Something is under way: an answer may come soon."""
        self._stirred_s = time.monotonic()

    def watch(self, sock: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        """Call ``ready`` with the events that a socket is ready for."""
        self._selector.register(sock, events, ready)

    def rewatch(self, sock: socket.socket, events: int, ready: Callable[[int], None]) -> None:
        """For other events from now on."""
        self._selector.modify(sock, events, ready)

    def forget(self, sock: socket.socket) -> None:
        """No more."""
        self._selector.unregister(sock)

    def go_on_while(self, wanted: Callable[[], bool]) -> None:
        """Take turns a thousand times a second, on a thread of its own, whenever this is so; it was not before."""
        if wanted not in self._goes_on:
            self._goes_on.append(wanted)
        if self._helper is None:
            self._helper = threading.Thread(target=self._help, name="shoal-streams", daemon=True)
            self._helper.start()
        self._wanted.set()

    def _help(self) -> None:
        while self._wanted.wait():
            time.sleep(_HELP_S)
            with self.lock:
                if self._closed:
                    return
                if any(wanted() for wanted in self._goes_on):
                    self._turn(0.0)
                else:
                    self._wanted.clear()

    def close(self) -> None:
        with self.lock:
            self._closed = True
            self._wanted.set()
        if self._helper is not None:
            self._helper.join()
        self._selector.close()


class Owner(Protocol):
    """Whom a stream tells what happens to it."""

    def began(self, stream: Stream) -> None:
        """The other side is there, and has shown that it holds the key."""
        ...

    def came(self, stream: Stream, message: Taken) -> None:
        """A message has come."""
        ...

    def ended(self, stream: Stream) -> None:
        """Nothing comes or goes any more."""
        ...


class Stream:
    """One connection. Until it has begun what is sent waits; what has not left when it ends is lost."""

    def __init__(self, loop: Loop, sock: socket.socket, sealer: Sealer | None, owner: Owner, *, calls: bool) -> None:
        """``calls``: this side connects, which may be under way."""
        self.is_open = True
        self.has_begun = sealer is None and not calls
        """Whether the other side is there, and has shown that it holds the key."""
        self._loop, self._socket, self._owner = loop, sock, owner
        self._sealer, self._connects = sealer, calls
        self._seal: Seal | None = None
        self._out: deque[memoryview] = deque()
        self._leaving = memoryview(b"")
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._filled = 0
        self._coming: Taken | None = None
        self._missing = memoryview(b"")
        self._events = _WRITE if calls else _READ
        loop.watch(sock, self._events, self._ready)

    @property
    def is_idle(self) -> bool:
        """Whether all that was sent has left."""
        return not (self._out or len(self._leaving))

    def send(self, number: int, head: Buffer, bodies: Sequence[Buffer]) -> None:
        """Buffers are sent as they are when they leave: they must not change before they are answered."""
        length = sum(map(len, bodies))
        first = _PREFIX.pack(_MARK, len(head), length, number)
        if length < _TOGETHER_BELOW:
            self._out.append(memoryview(b"".join((first, head, *bodies))))
        else:
            self._out.append(memoryview(first + bytes(head)))
            self._out.extend(memoryview(body) for body in bodies if len(body))
        if self.has_begun and self._events == _READ:
            self._ready(_WRITE)

    def close(self) -> None:
        """Hang up, without telling the owner."""
        if self.is_open:
            self.is_open = False
            self._loop.forget(self._socket)
            self._socket.close()
            self._out.clear()
            self._leaving = memoryview(b"")

    # When the socket is ready

    def _ready(self, events: int) -> None:
        try:
            if self.has_begun:
                self._go_on(events)
            else:
                self._come_to_begin(events)
        except (OSError, MemoryError):  # all that a peer or a network can do, among it TLS that fails
            if self.is_open:
                self.close()
                self._owner.ended(self)

    def _go_on(self, events: int) -> None:
        if events & _READ:
            self._read()
        if events & _WRITE and self.is_open:
            self._write()

    def _come_to_begin(self, events: int) -> None:
        if self._connects:
            if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, "cannot connect")
            if self._socket.getsockname() == self._socket.getpeername():
                raise ConnectionError("nobody listens there, and the system has connected this socket with itself")
            self._connects = False
        if self._sealer is not None and self._seal is None:
            self._seal = Seal(self._sealer, self._socket)
        if events & _READ:
            self._read()
        if self.is_open and (self._seal is None or self._seal.shake_hands()):
            self._begin()
        if self.is_open:
            self._write()

    def _begin(self) -> None:
        """Go on from the handshake, with what has come behind it."""
        early = memoryview(b"")
        if self._seal is not None and not self._seal.is_needed:
            if len(last := self._seal.encrypted(early)):
                self._out.appendleft(last)
            early, self._seal = self._seal.unread(), None
        self.has_begun = True
        self._owner.began(self)
        if self._seal is not None and self.is_open:
            self._decrypt()
        while len(early) and self.is_open:
            room = self._room()[: len(early)]
            room[:] = early[: len(room)]
            early = early[len(room) :]
            self._put(len(room))

    def _await(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._loop.rewatch(self._socket, events, self._ready)

    # Out

    def _write(self) -> None:
        while len(self._leaving) or self._load():
            try:
                self._leaving = self._leaving[self._socket.send(self._leaving) :]
            except BlockingIOError:
                self._await(_READ | _WRITE)
                return
        self._await(_READ)

    def _load(self) -> bool:
        """Have the next of what is to be sent be ready to leave; whether there is any."""
        data = memoryview(b"")
        if self._out and self.has_begun:
            data = self._out.popleft()
            if len(data) > _SLICE_BYTES:
                self._out.appendleft(data[_SLICE_BYTES:])
                data = data[:_SLICE_BYTES]
        self._leaving = data if self._seal is None else self._seal.encrypted(data)
        return bool(len(self._leaving))

    # In

    def _read(self) -> None:
        """Until a message has come, or nothing more: others have their turn then."""
        has_come = False
        while self.is_open and not has_come:
            try:
                if self._seal is None:
                    num = self._socket.recv_into(self._room())
                else:
                    num = self._seal.take_from(self._socket, self._loop.room)
            except BlockingIOError:
                return
            if not num:
                raise ConnectionError("the other side has hung up")
            if self._seal is None:
                has_come = self._put(num)
            elif not self.has_begun:
                return
            else:
                has_come = self._decrypt()

    def _decrypt(self) -> bool:
        """All that is there; whether a message has come."""
        assert self._seal is not None
        has_come = False
        while self.is_open and (num := self._seal.read_into(self._room())):
            has_come |= self._put(num)
        return has_come

    def _room(self) -> memoryview:
        """Where the next bytes belong."""
        return self._missing if self._coming else self._scratch[self._filled :]

    def _put(self, num: int) -> bool:
        """So many bytes more are where they belong. What is complete is given on; whether anything was."""
        if self._coming:
            self._missing = self._missing[num:]
        else:
            self._filled += num
        found, at = False, 0
        while self.is_open:
            if self._coming is None and at < self._filled:
                at = self._take_head(at)
            if self._coming is None or len(self._missing):
                break
            message, self._coming = self._coming, None
            found = True
            self._owner.came(self, message)
        if at:
            if rest := self._filled - at:
                self._scratch[:rest] = bytes(self._scratch[at : self._filled])
            self._filled = rest
        return found

    def _take_head(self, at: int) -> int:
        """Begin the message that is in the scratch from there, if its head is: where what follows begins."""
        if self._filled - at < _PREFIX.size:
            return at
        mark, head_length, body_length, number = _PREFIX.unpack_from(self._scratch, at)
        if mark != _MARK or head_length > _LARGEST_HEAD:
            raise ConnectionError("this is not the beginning of a message")
        before = -head_length % _ALIGNED
        room = _room_for(before + head_length + body_length)
        start = at + _PREFIX.size
        stop: int = min(start + head_length + body_length, self._filled)
        has = before + stop - start
        room[before:has] = self._scratch[start:stop]
        body_at = before + head_length
        self._coming, self._missing = (number, room[before:body_at], room[body_at:]), room[has:]
        return stop


def _room_for(num_bytes: int) -> memoryview:
    """``ConnectionError`` if there is none."""
    if num_bytes < _SMALL_BYTES:
        return memoryview(bytearray(num_bytes))
    try:
        return memoryview(np.empty(num_bytes, np.uint8))  # type: ignore[arg-type]
    except (MemoryError, ValueError) as error:
        raise ConnectionError(f"there is no room for a message of {num_bytes} bytes") from error


def listener(host: str, port: int) -> socket.socket:
    """Listens there; port 0 picks one. ``ConfigError`` if it cannot."""
    try:
        family, *_, address = _found(host, port, socket.AI_PASSIVE)
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; is it in use? choose another port") from error
    return sock


def caller(address: str) -> socket.socket:
    """A socket that is connecting to HOST:PORT. ``ConfigError`` if that reads otherwise, ``OSError`` if it cannot."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise ConfigError(f"cannot call {address!r}: an address reads HOST:PORT")
    family, *_, where = _found(host.strip("[]"), int(port))
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        tune(sock)
        sock.connect(where)
    except BlockingIOError:  # it is under way
        pass
    except OSError:
        sock.close()
        raise
    return sock


def _found(host: str, port: int, flags: int = 0) -> Any:
    """A name's first address, IPv4 if it has one, as whoever listens by a name does."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return sorted(found, key=lambda one: one[0] != socket.AF_INET)[0]


def tune(sock: socket.socket) -> None:
    """Small messages leave at once, and a host that has vanished is noticed within a minute."""
    options: list[tuple[int, Any, int]] = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _IDLE_S),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _PROBE_S),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", _NUM_PROBES),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", _UNHEARD_MS),
    ]
    for level, name, value in options:
        if hasattr(socket, name):  # which of them there are goes by the system
            sock.setsockopt(level, getattr(socket, name), value)
