"""HTTP/1.1 for an ASGI app, as lean as it can be: what reads the bytes is llhttp, by httptools.

Each connection has one exchange after another; what is sent ahead waits. See ADR 21 for why this is here.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import urllib.parse
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol, cast

import httptools
import msgspec

from shoal.serving.exchange import CLOSE, Exchange, Head, head_of
from shoal.serving.inference import LARGE_BYTES, ON_GONE, Asked
from shoal.serving.limits import BACKLOG

if TYPE_CHECKING:
    import ssl

    from starlette.types import ASGIApp, Scope

_log = logging.getLogger(__name__)

_MOST_HEAD_BYTES = 1 << 16
_MOST_AROUND = 8
"""Bytes of the chunks that a body comes in, for each of its own: it may come byte by byte."""
_MOST_AHEAD_BYTES = 1 << 18
"""Of a body, that nobody has taken yet."""
_MOST_AHEAD = 32
"""Requests on one connection that wait for the one before them."""
_MOST_AT_ONCE = 8
"""Of those that are answered at once, before others have their turn."""
_IDLE_S = 75.0
_SLOW_S = 30.0
"""For a request's head to come, for the rest of a refused body, and for a client to read an answer."""
_LONG_URL = 256
"""Longer ones are not remembered."""
_SWEEP_S = 1.0
_SHUTDOWN_S = 10.0
_HANDSHAKE_S = 10.0
_ASGI = {"version": "3.0", "spec_version": "2.3"}


class Quick(Protocol):
    """Answers some requests that came whole without a task, as ASGI has one, which would cost as much as all else."""

    def begin(self, path: str, asked: Asked) -> bool:
        """Take a POST, to answer it now or later. False for one of others."""
        ...


class HttpServer:
    """Serves an ASGI app on one listener. ``quick``: what answers before it is asked."""

    def __init__(self, app: ASGIApp, tls: ssl.SSLContext | None = None, quick: Quick | None = None) -> None:
        self._app = app
        self._tls = tls
        self._quick = quick
        self._connections: set[_Connection] = set()
        self._ended = asyncio.Event()

    async def serve(self, listener: socket.socket) -> None:
        """Until ``end``: then finish what was asked, for at most 10 s."""
        loop = asyncio.get_running_loop()
        shared = _Shared(self._app, self._quick, "https" if self._tls else "http", self._connections)
        handshake_s = _HANDSHAKE_S if self._tls else None
        server = await loop.create_server(
            lambda: _Connection(shared, loop), sock=listener, ssl=self._tls, ssl_handshake_timeout=handshake_s,
            backlog=BACKLOG,
        )  # fmt: skip
        sweeping = asyncio.create_task(self._sweep())
        try:
            await self._ended.wait()
        finally:
            server.close()
            sweeping.cancel()
            await self._finish()

    def end(self) -> None:
        """From the loop that serves."""
        self._ended.set()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = asyncio.get_running_loop().time()
            for connection in list(self._connections):
                connection.close_if_idle(now_s)

    async def _finish(self) -> None:
        for connection in list(self._connections):
            connection.finish()
        until_s = asyncio.get_running_loop().time() + _SHUTDOWN_S
        while self._connections and asyncio.get_running_loop().time() < until_s:
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.abort()


class _Shared:
    """What all connections of a server have in common."""

    __slots__ = ("app", "connections", "quick", "scheme")

    def __init__(self, app: ASGIApp, quick: Quick | None, scheme: str, connections: set[_Connection]) -> None:
        self.app = app
        self.quick = quick
        self.scheme = scheme
        self.connections = connections


class _Connection(asyncio.Protocol):
    """Reads requests, and has them answered in their order."""

    def __init__(self, shared: _Shared, loop: asyncio.AbstractEventLoop) -> None:
        self._shared = shared
        self._loop = loop
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._expects = False
        self._head_bytes = 0
        self._body_bytes = 0
        self._coming: Exchange | None = None
        """Whose body is being read; so many bytes have come of that, with what surrounds its chunks."""
        self._current: Exchange | None = None
        """Which is being answered; perhaps the same."""
        self._waiting: deque[Exchange] = deque()
        self._task: asyncio.Task[None] | None = None
        self._since_s = loop.time()
        self._is_paused = False
        self.may_write: asyncio.Event | None = None
        """To be waited for before more is written, if it is there."""
        self._is_ending = False
        """Nothing more is read, and the connection ends once what has come is answered."""
        self._is_starting = False

    # Of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        self._shared.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._shared.connections.discard(self)
        self._waiting.clear()
        self._parser = None  # they hold each other
        self._is_ending = True
        if self._current is not None:
            self._current.hang_up()
        if self.may_write is not None:
            self.may_write.set()

    def data_received(self, data: bytes) -> None:
        if self._parser is None or (self._is_ending and self._coming is None):
            return
        if self._coming is None:
            if not self._head_bytes and self._current is None:
                self._since_s = self._loop.time()
            self._head_bytes += len(data)
        else:
            self._body_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._is_ending = True  # it is answered as what it is without: nothing else is spoken here
        except httptools.HttpParserError as error:
            self._refuse(400, f"this is no HTTP request: {error.__context__ or error}")
        else:
            self._check()
        self._weigh()
        self._start_next()

    def _check(self) -> None:
        """Refuse a head that is too long, or what trails a body, or more about chunks than is in them."""
        if self._coming is None and self._head_bytes > _MOST_HEAD_BYTES:
            self._refuse(431, f"the head of a request has at most {_MOST_HEAD_BYTES} bytes")
        elif self._coming is not None and self._body_bytes > _MOST_HEAD_BYTES + _MOST_AROUND * self._coming.num_fed:
            self._refuse(431, f"what is around a body has at most {_MOST_HEAD_BYTES} bytes")

    def pause_writing(self) -> None:
        self.may_write = asyncio.Event()
        self._since_s = self._loop.time()

    def resume_writing(self) -> None:
        if self.may_write is not None:
            self.may_write.set()
        self.may_write = None

    # Of the parser

    def on_message_begin(self) -> None:
        self._url, self._headers, self._expects = b"", [], False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._coming is not None:
            return  # after a body in chunks: nobody asks for these
        name = name.lower()
        self._headers.append((name, value))
        if name == b"expect":
            self._expects = True

    def on_headers_complete(self) -> None:
        parser, url = self._parser, self._url
        assert parser is not None
        split = _split(url) if len(url) > _LONG_URL else _known(url)
        head = Head(parser.get_method(), *split, parser.get_http_version(), self._headers, self._expects)
        self._head_bytes = self._body_bytes = 0
        self._coming = Exchange(self, head, parser.should_keep_alive())
        self._waiting.append(self._coming)

    def on_body(self, data: bytes) -> None:
        if self._coming is not None:
            self._coming.feed(data)

    def on_message_complete(self) -> None:
        if self._coming is not None:
            self._coming.has_all()
        self._coming = None

    # Exchanges

    def _weigh(self) -> None:
        """Read on, unless too much has come that nobody has taken."""
        has_much = self._coming is not None and self._coming.num_bytes > _MOST_AHEAD_BYTES
        if (has_much or len(self._waiting) > _MOST_AHEAD) != self._is_paused:
            self._is_paused = not self._is_paused
            if self._is_paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _start_next(self) -> None:
        if self._is_starting:
            return
        self._is_starting = True  # what is answered at once is no deeper a call
        for _ in range(_MOST_AT_ONCE):
            if self._current is not None or not self._waiting:
                break
            self._current = exchange = self._waiting.popleft()
            if not self._begins(exchange):
                self._task = self._loop.create_task(self._answer(exchange))
        else:
            self._loop.call_soon(self._start_next)  # others are served in between
        self._is_starting = False

    def _begins(self, exchange: Exchange) -> bool:
        """Whether it is being answered without a task."""
        quick = self._shared.quick
        is_small_post = exchange.is_whole and exchange.num_bytes <= LARGE_BYTES and exchange.head.method == b"POST"
        if quick is None or not is_small_post:
            return False
        try:
            return quick.begin(exchange.head.path, exchange)
        except Exception:  # noqa: BLE001 - the server answers others
            _log.exception("an answer could not be made")
            if not exchange.is_answered:
                exchange.fail()
                self.answered(exchange)
            return True

    async def _answer(self, exchange: Exchange) -> None:
        try:
            await self._shared.app(self._scope(exchange), exchange.receive, exchange.send)
        except Exception:  # noqa: BLE001 - the server answers others
            _log.exception("an answer could not be made")
        if not exchange.is_answered and not exchange.has_gone:
            if exchange.has_begun:
                exchange.keeps_alive = False
            else:
                exchange.fail()
        await self._go_on(exchange)

    def _scope(self, exchange: Exchange) -> Scope:
        head = exchange.head
        return {
            "type": "http", "asgi": _ASGI, "http_version": head.version, "server": self._server,
            "client": self._client, "scheme": self._shared.scheme, "method": head.method.decode("ascii"),
            "root_path": "", "path": head.path, "raw_path": head.raw_path, "query_string": head.query,
            "headers": head.headers, "extensions": {ON_GONE: exchange.on_gone},
        }  # fmt: skip

    def answered(self, exchange: Exchange) -> None:
        """One that has no task."""
        if self.may_write is None:
            self._end(exchange)
        else:
            self._task = self._loop.create_task(self._go_on(exchange))

    async def _go_on(self, exchange: Exchange) -> None:
        if self.may_write is not None:
            await self.may_write.wait()
        self._end(exchange)

    def _end(self, exchange: Exchange) -> None:
        """Of an exchange; what is next?"""
        self._current = self._task = None
        self._since_s = self._loop.time()
        if self.is_last or not exchange.keeps_alive:
            self._is_ending = True
            self._waiting.clear()
            self._transport.close()
        else:
            self.took()
            self._start_next()

    @property
    def is_last(self) -> bool:
        """Whether the connection ends with the answer that is being made."""
        return self._is_ending and not self._waiting

    def write(self, data: bytes) -> None:
        """A part of an answer."""
        self._transport.write(data)

    def took(self) -> None:
        """There may be room for more."""
        if self._is_paused:
            self._weigh()

    def _refuse(self, status: int, reason: str) -> None:
        """What cannot be understood; nor can what comes after it. What came before it is answered."""
        broken, self._coming, self._is_ending = self._coming, None, True
        if broken is not None and broken in self._waiting:
            self._waiting.remove(broken)
        if self._waiting or broken is not self._current is not None:
            return
        if broken is None or not broken.has_begun:
            body = msgspec.json.encode({"error": reason})
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            self._transport.write(head_of(status, [*headers, CLOSE]) + body)
        if broken is not None:
            broken.hang_up()
        self._transport.close()

    # Of the server

    def close_if_idle(self, now_s: float) -> None:
        """Close it if nothing has come for long, or too little; or if nothing is read there."""
        waited_s = now_s - self._since_s
        if self.may_write is not None:
            if waited_s > _SLOW_S:
                self._transport.abort()
        elif self._current is None:
            is_idle = self._coming is None and not self._head_bytes
            if waited_s > (_IDLE_S if is_idle else _SLOW_S):
                self._transport.close()

    def finish(self) -> None:
        """Close it once what is being answered is."""
        self._is_ending = True
        self._waiting.clear()
        if self._current is None:
            self._transport.close()

    def abort(self) -> None:
        """Close it now."""
        if self._task is not None:
            self._task.cancel()
        self._transport.abort()


def _split(url: bytes) -> tuple[str, bytes, bytes]:
    """The path, the same as it came, and the query. ``HttpParserInvalidURLError`` for what is no URL."""
    parsed = httptools.parse_url(url)
    raw_path = parsed.path or b"/"
    path = raw_path.decode("ascii")
    return urllib.parse.unquote(path) if "%" in path else path, raw_path, parsed.query or b""


_known = functools.lru_cache(256)(_split)


def _address(found: Any) -> tuple[str, int] | None:
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) and len(found) >= 2 else None
