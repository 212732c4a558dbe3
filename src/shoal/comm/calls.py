"""Calls with bulk in them: a question of a head and a body, and its answer.

A caller asks many servers, has many questions open, and asks again where a connection was lost: so a question must be
one that may be asked twice. Bodies are sent without a copy: they must not change before the answer.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from shoal.comm.keys import JobKey
from shoal.comm.sealing import Sealer
from shoal.comm.streams import Buffer, Loop, Stream, Taken, caller, listener, tune
from shoal.errors import Bug, LinkFault

_RECONNECT_S, _CONNECT_S = 0.02, 5.0
_TICK_S = 0.05
_LINGER_S = 0.2
_LARGE_BYTES = 1 << 16
_STRANGER_S, _MOST_STRANGERS = 10.0, 64
"""Who has called and not shown its key by then is hung up on when others call, or before then if there are many."""
_ACCEPTED_AT_ONCE, _BREATH_S = 32, 0.01


class Question(NamedTuple):
    """What was asked. ``peer`` and ``number`` are for the answer."""

    peer: Stream
    number: int
    head: memoryview
    body: memoryview


class Answerer:
    """Takes questions from whoever holds ``key``; one thread. Without a key anyone may ask, in the clear: for a network
    that is trusted. ``ConfigError`` for an address that cannot be listened on; port 0 picks one."""

    def __init__(self, host: str, port: int, key: JobKey | None) -> None:
        self._sealer = Sealer.of(key, calls=False) if key is not None else None
        self.loop = Loop()
        self._listener = listener(host, port)
        name, number, *_ = self._listener.getsockname()
        self.address = f"[{name}]:{number}" if ":" in name else f"{name}:{number}"
        self._streams: dict[Stream, float] = {}  # and since when
        self._questions: deque[Question] = deque()
        self._is_busy = False
        self.loop.watch(self._listener, selectors.EVENT_READ, self._accept)

    def receive(self, timeout_s: float) -> Question | None:
        """The next question, or None if none comes in time, or if something comes for others of its ``loop`` first."""
        with self.loop.lock:
            self._is_busy = False
            self.loop.turn(0.0 if self._questions else timeout_s)
            if not self._questions:
                return None
            question = self._questions.popleft()
            if len(question.body) > _LARGE_BYTES:  # it takes a while, and what comes next is as large
                self._is_busy = True
                self.loop.go_on_while(self._has_been_asked)
            return question

    def _has_been_asked(self) -> bool:
        return self._is_busy

    def answer(self, question: Question, head: bytes, *body: Buffer) -> None:
        """One for a caller that is gone is dropped."""
        with self.loop.lock:
            if question.peer.is_open:
                question.peer.send(question.number, head, body)

    def close(self) -> None:
        """Once what was answered has left, or it takes too long."""
        deadline_s = time.monotonic() + _LINGER_S
        with self.loop.lock:
            while not all(stream.is_idle for stream in self._streams) and time.monotonic() < deadline_s:
                self.loop.turn(deadline_s - time.monotonic())
            for stream in self._streams:
                stream.close()
            self.loop.forget(self._listener)
            self._listener.close()
        self.loop.close()

    def _accept(self, _events: int) -> None:
        """All that call, at most so many at once."""
        late_s = time.monotonic() - _STRANGER_S
        strangers = [stream for stream in self._streams if not stream.has_begun]
        for number, stream in enumerate(strangers):
            if self._streams[stream] < late_s or number < len(strangers) - _MOST_STRANGERS:
                stream.close()
                del self._streams[stream]
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # who called has hung up, or no more connections can be had now
                time.sleep(_BREATH_S)
                return
            try:
                sock.setblocking(False)
                tune(sock)
                self._streams[Stream(self.loop, sock, self._sealer, self, calls=False)] = time.monotonic()
            except OSError:
                sock.close()

    # What a stream tells

    def began(self, stream: Stream) -> None:
        """It is to ask now."""

    def came(self, stream: Stream, message: Taken) -> None:
        self._questions.append(Question(stream, *message))

    def ended(self, stream: Stream) -> None:
        self._streams.pop(stream, None)


@dataclass
class _Server:
    """Whom to ask. Without a stream it is called again at ``call_at_s``."""

    name: str
    address: str
    stream: Stream | None = None
    call_at_s: float = 0.0

    @property
    def has_begun(self) -> bool:
        return self.stream is not None and self.stream.has_begun


class _Open(NamedTuple):
    to: str
    head: bytes
    body: tuple[Buffer, ...]
    expects: int


class Calls:
    """Asks servers, which it knows by name; one thread. An address may change while questions are open. ``loop``: one
    that others wait on as well, and close."""

    def __init__(self, key: JobKey | None, addresses: Mapping[str, str], loop: Loop | None = None) -> None:
        self._sealer = Sealer.of(key, calls=True) if key is not None else None
        self._loop, self._owns_loop = loop or Loop(), loop is None
        self._servers: dict[str, _Server] = {}
        self._by_stream: dict[Stream, _Server] = {}
        self._last = 0
        self._open: dict[int, _Open] = {}
        self._answers: dict[int, tuple[memoryview, memoryview]] = {}
        for name, address in addresses.items():
            self.meet(name, address)

    def meet(self, name: str, address: str) -> None:
        """``name`` is found there from now on; what is still open is asked again there."""
        with self._loop.lock:
            known = self._servers.get(name)
            if known is not None and known.address == address:
                return
            server = _Server(name, address)
            self._call(server)
            if known is not None:
                self._hang_up(known)
            self._servers[name] = server

    def knows(self, name: str) -> bool:
        """Whether it is known where that is."""
        return name in self._servers

    def part(self, name: str) -> None:
        """Hang up. What is open there stays open."""
        with self._loop.lock:
            self._hang_up(self._servers.pop(name))

    def ask(self, to: str, head: bytes, *body: Buffer, expects: int = 0) -> int:
        """Send a question: its number, for ``wait``. ``expects``: about how many bytes the answer has."""
        with self._loop.lock:
            self._last += 1
            self._open[self._last] = _Open(to, head, body, expects)
            server = self._servers.get(to)
            stream = server.stream if server is not None else None
            if stream is not None and stream.has_begun:
                stream.send(self._last, head, body)
                self._loop.stir()
            if expects > _LARGE_BYTES or (stream is not None and not stream.is_idle):
                self._loop.go_on_while(self._is_large_under_way)
            return self._last

    def wait(
        self, number: int, timeout_s: float, check: Callable[[], None] = lambda: None
    ) -> tuple[memoryview, memoryview]:
        """Its answer. ``LinkFault`` if none comes in time; it may still be waited for. ``check`` is called now and
        then, and may raise."""
        deadline_s = time.monotonic() + timeout_s
        while not self._has_come(number, min(deadline_s - time.monotonic(), _TICK_S)):
            entry = self._open.get(number)  # a helper may have taken the answer just now
            if entry is not None and time.monotonic() > deadline_s:
                server = self._servers.get(entry.to)
                where = server.address if server is not None else "no known address"
                raise LinkFault(f"{entry.to} at {where} did not answer within {timeout_s:g} s")
            check()
        return self._answers.pop(number)

    def _has_come(self, number: int, timeout_s: float) -> bool:
        """Whether an answer is there, after a turn if need be. A helper may have taken it while the lock was waited
        for."""
        with self._loop.lock:
            until_s = time.monotonic() + timeout_s
            while number not in self._answers:
                if number not in self._open:
                    raise Bug(f"question {number} is not open")
                if not self._turn(until_s - time.monotonic()) or time.monotonic() > until_s:
                    break
            return number in self._answers

    def take(self) -> None:
        """Take what has come, without waiting."""
        self._turn(0.0)

    def answer(self, number: int) -> tuple[memoryview, memoryview] | None:
        """An answer, if it has been taken."""
        return self._answers.pop(number, None)

    def forget(self, numbers: Iterable[int]) -> None:
        """Nobody will wait for these any more."""
        with self._loop.lock:
            for number in numbers:
                self._open.pop(number, None)
                self._answers.pop(number, None)

    def forget_all(self) -> None:
        """Nobody will wait for anything that is open."""
        with self._loop.lock:
            self._open.clear()
            self._answers.clear()

    def close(self) -> None:
        for name in list(self._servers):
            self.part(name)
        if self._owns_loop:
            self._loop.close()

    # What is large

    def _is_large_under_way(self) -> bool:
        waits = any(not s.stream.is_idle for s in self._servers.values() if s.stream is not None)
        return waits or any(entry.expects > _LARGE_BYTES for entry in self._open.values())

    # Connections

    def _turn(self, timeout_s: float) -> bool:
        with self._loop.lock:
            now_s = time.monotonic()
            for server in self._servers.values():
                if not server.has_begun and now_s >= server.call_at_s:
                    self._hang_up(server)
                    self._call(server)
                if not server.has_begun:
                    timeout_s = min(timeout_s, max(0.0, server.call_at_s - now_s))
            return self._loop.turn(timeout_s)

    def _call(self, server: _Server) -> None:
        """Begin to. Where it takes too long it is tried anew: an answer to the first attempt may be lost."""
        server.call_at_s = time.monotonic() + _RECONNECT_S
        try:
            sock: socket.socket = caller(server.address)
        except OSError:
            return
        try:
            server.stream = Stream(self._loop, sock, self._sealer, self, calls=True)
        except OSError:
            sock.close()
            return
        server.call_at_s = time.monotonic() + _CONNECT_S
        self._by_stream[server.stream] = server

    def _hang_up(self, server: _Server) -> None:
        if server.stream is not None:
            server.stream.close()
            del self._by_stream[server.stream]
            server.stream = None

    # What a stream tells

    def began(self, stream: Stream) -> None:
        name = self._by_stream[stream].name
        for number, entry in self._open.items():
            if entry.to == name:
                stream.send(number, entry.head, entry.body)
        if not stream.is_idle:
            self._loop.go_on_while(self._is_large_under_way)

    def came(self, stream: Stream, message: Taken) -> None:
        number, head, body = message
        if number in self._open:
            self._answers[number] = head, body
            del self._open[number]

    def ended(self, stream: Stream) -> None:
        server = self._by_stream.pop(stream)
        server.stream = None
        server.call_at_s = time.monotonic() + _RECONNECT_S
