"""Calls with bulk in them: a question of a few frames, and its answer.

A caller asks many servers, has many questions open, and asks again where a connection was lost: so a question must be
one that may be asked twice. Frames are bytes, and are sent without a copy: they must not change before the answer.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

from shoal.comm.doorkeeper import Doorkeeper
from shoal.comm.keys import JobKey
from shoal.comm.link import listening
from shoal.errors import ConfigError, LinkFault

Frame = bytes | memoryview
Door = zmq.Socket[bytes]
"""Where something comes."""
_NUMBER = struct.Struct("<Q")
_RECONNECT_MS = 20
_AGAIN_S = 2.0
_TICK_S = 0.05
_COPIED_BELOW = 1 << 17
_PIECE_BYTES = 1 << 19
_IO_THREADS = 2
_MORE, _LAST = int(zmq.SNDMORE | zmq.DONTWAIT), int(zmq.DONTWAIT)
_DONTWAIT, _POLLIN = int(zmq.DONTWAIT), int(zmq.POLLIN)


def pieces(body: Frame) -> list[Frame]:
    """A body as frames: while one is encrypted, the one before it travels, and the one before that is decrypted."""
    view = memoryview(body)
    return [view[at : at + _PIECE_BYTES] for at in range(0, max(1, len(view)), _PIECE_BYTES)]


def joined(frames: Sequence[Frame]) -> bytes:
    """The body that came as these."""
    return b"".join(frames)


@dataclass(frozen=True)
class Question:
    """What was asked. ``peer`` and ``number`` are for the answer."""

    peer: bytes
    number: bytes
    frames: Sequence[memoryview]


class Answerer:
    """Takes questions from whoever holds ``key``; one thread. Without a key anyone may ask, in the clear: for a network
    that is trusted. ``ConfigError`` for an address that cannot be listened on; port 0 picks one."""

    def __init__(self, host: str, port: int, key: JobKey | None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(_IO_THREADS)
        self._doorkeeper = Doorkeeper(self._context, key) if key is not None else None
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 200
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.SNDHWM, 100_000)
        self._socket.setsockopt(zmq.RCVHWM, 100_000)
        if key is not None:
            key.listen(self._socket)
        try:
            self.address = listening(self._socket, host, port)
        except ConfigError:
            self.close()
            raise

    def receive(self, timeout_s: float, others: Sequence[Door] = ()) -> Question | None:
        """The next question, or None if none comes in time, or if something comes for ``others`` first."""
        if others:
            zmq.select([self._socket, *others], [], [], timeout_s)
            timeout_s = 0
        if not self._socket.poll(max(0, int(timeout_s * 1000))):
            return None
        peer, first, *frames = [frame.buffer for frame in self._socket.recv_multipart(copy=False)]
        return Question(bytes(peer), bytes(first[: _NUMBER.size]), [first[_NUMBER.size :], *frames])

    def answer(self, question: Question, head: bytes, *frames: Frame) -> None:
        """One for a caller that is gone is dropped."""
        _send(self._socket, (question.peer, question.number + head, *frames))

    def close(self) -> None:
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()


@dataclass
class _Open:
    to: str
    head: bytes
    frames: Sequence[Frame]
    asked_at_s: float


class Calls:
    """Asks servers, which it knows by name; one thread. ``address`` may change while questions are open."""

    def __init__(self, key: JobKey | None, addresses: Mapping[str, str]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(_IO_THREADS)
        self._key = key
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._monitors: dict[str, zmq.Socket[bytes]] = {}
        self._addresses: dict[str, str] = {}
        self._poller = zmq.Poller()
        self._last = 0
        self._open: dict[int, _Open] = {}
        self._answers: dict[int, list[memoryview]] = {}
        self._met: set[str] = set()
        self._looked_at_s = 0.0
        for name, address in addresses.items():
            self.meet(name, address)

    def meet(self, name: str, address: str) -> None:
        """``name`` is found there from now on; what is still open is asked again there."""
        if self._addresses.get(name) == address:
            return
        if name in self._sockets:
            self.part(name)
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.SNDHWM, 100_000)
        socket.setsockopt(zmq.RCVHWM, 100_000)
        if self._key is not None:
            self._key.call(socket)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            socket.connect(f"tcp://{address}")
        except zmq.ZMQError as error:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close()
            raise ConfigError(f"cannot call {address!r}: {error}; an address reads HOST:PORT") from error
        self._addresses[name], self._sockets[name], self._monitors[name] = address, socket, monitor
        self._poller.register(socket, zmq.POLLIN)
        self._ask_again(name)

    def knows(self, name: str) -> bool:
        """Whether it is known where that is."""
        return name in self._addresses

    def part(self, name: str) -> None:
        """Hang up. What is open there stays open."""
        socket, monitor = self._sockets.pop(name), self._monitors.pop(name)
        self._poller.unregister(socket)
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close()
        del self._addresses[name]
        self._met.discard(name)

    def ask(self, to: str, head: bytes, *frames: Frame) -> int:
        """Send a question: its number, for ``wait``."""
        self._last += 1
        self._open[self._last] = _Open(to, head, frames, time.monotonic())
        self._send(self._last)
        return self._last

    def wait(self, number: int, timeout_s: float, check: Callable[[], None] = lambda: None) -> Sequence[memoryview]:
        """Its answer. ``LinkFault`` if none comes in time; it may still be waited for. ``check`` is called now and
        then, and may raise."""
        deadline_s = time.monotonic() + timeout_s
        while number not in self._answers:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                to = self._open[number].to
                raise LinkFault(f"{to} at {self._addresses.get(to)} did not answer within {timeout_s:g} s")
            if not self._turn(min(left_s, _TICK_S)):
                check()
        return self._answers.pop(number)

    def take(self) -> None:
        """Take what has come, without waiting."""
        self._turn(0.0)

    def answer(self, number: int) -> Sequence[memoryview] | None:
        """An answer, if it has been taken."""
        return self._answers.pop(number, None)

    @property
    def sockets(self) -> Sequence[Door]:
        """Where answers come."""
        return list(self._sockets.values())

    def forget(self, numbers: Iterable[int]) -> None:
        """Nobody will wait for these any more."""
        for number in numbers:
            self._open.pop(number, None)
            self._answers.pop(number, None)

    def forget_all(self) -> None:
        """Nobody will wait for anything that is open."""
        self._open.clear()
        self._answers.clear()

    def _turn(self, timeout_s: float) -> bool:
        """Take what comes; whether anything did."""
        ready = self._poller.poll(max(0, round(timeout_s * 1000)))
        for socket, _ in ready:
            self._receive(socket)
        if not ready or time.monotonic() > self._looked_at_s + _TICK_S:
            self._looked_at_s = time.monotonic()
            for name in list(self._monitors):
                self._look_at(name)
        if not ready and self._open:
            late_s = time.monotonic() - _AGAIN_S
            for number, entry in self._open.items():
                if entry.asked_at_s < late_s:
                    self._send(number)
        return bool(ready)

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while socket.getsockopt(zmq.EVENTS) & _POLLIN:  # type: ignore[operator]
            first, *frames = [frame.buffer for frame in socket.recv_multipart(_DONTWAIT, copy=False)]
            (number,) = _NUMBER.unpack_from(first)
            if self._open.pop(number, None) is not None:
                self._answers[number] = [first[_NUMBER.size :], *frames]

    def _look_at(self, name: str) -> None:
        """A server that was met before has lost what was under way to it, or has been replaced."""
        while self._monitors[name].poll(0):
            parse_monitor_message(self._monitors[name].recv_multipart())
            if name in self._met:
                self._ask_again(name)
            self._met.add(name)

    def _ask_again(self, name: str) -> None:
        for number, entry in self._open.items():
            if entry.to == name:
                self._send(number)

    def _send(self, number: int) -> None:
        entry = self._open[number]
        entry.asked_at_s = time.monotonic()
        if entry.to in self._sockets:
            _send(self._sockets[entry.to], (_NUMBER.pack(number) + entry.head, *entry.frames))

    def close(self) -> None:
        for name in list(self._sockets):
            self.part(name)
        self._context.term()


def _send(socket: zmq.Socket[bytes], frames: Sequence[Frame]) -> None:
    try:
        for frame in frames[:-1]:
            socket.send(frame, _MORE, copy=len(frame) < _COPIED_BELOW)
        socket.send(frames[-1], _LAST, copy=len(frames[-1]) < _COPIED_BELOW)
    except zmq.Again:  # nobody has been there for long: it is asked again
        return
