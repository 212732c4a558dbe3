"""One HTTP/1.1 request and its answer on a connection: what has come of it, and how an answer goes."""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from starlette.types import Message

CLOSE = (b"connection", b"close")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_BODILESS = frozenset({204, 304})
_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in http.HTTPStatus}
_GONE: Message = {"type": "http.disconnect"}


class Connection(Protocol):
    """Where an exchange is."""

    may_write: asyncio.Event | None
    """To be waited for before more is written, if it is there."""

    @property
    def is_last(self) -> bool:
        """Whether it ends with the answer that is being made."""
        ...

    def write(self, data: bytes) -> None:
        """A part of an answer."""
        ...

    def took(self) -> None:
        """There may be room for more."""
        ...

    def answered(self, exchange: Exchange) -> None:
        """One that has no task."""
        ...


class Head(NamedTuple):
    """What comes before a body."""

    method: bytes
    path: str
    raw_path: bytes
    query: bytes
    version: str
    headers: list[tuple[bytes, bytes]]
    expects: bool


class Exchange:
    """One request and its answer: as ASGI has them, or, if it came whole, as ``Asked``."""

    __slots__ = (
        "_chunks", "_connection", "_expects", "_is_bare", "_is_chunked", "_on_gone", "_start", "_waiter", "_was_told",
        "has_begun", "has_gone", "head", "is_answered", "is_whole", "keeps_alive", "num_bytes", "num_fed",
    )  # fmt: skip

    def __init__(self, connection: Connection, head: Head, keeps_alive: bool) -> None:
        self.head = head
        self.keeps_alive = keeps_alive
        self.has_begun = self.has_gone = self.is_answered = self.is_whole = False
        self.num_bytes = 0
        """Of the body, that nobody has taken yet."""
        self.num_fed = 0
        """Of the body, that have come."""
        self._connection = connection
        self._expects = head.expects
        self._chunks: list[bytes] = []
        self._was_told = self._is_chunked = self._is_bare = False
        self._waiter: asyncio.Future[None] | None = None
        self._start: Message | None = None
        self._on_gone: Callable[[], object] | None = None

    def on_gone(self, tell: Callable[[], object]) -> None:
        """To be called if nobody is there any more to be answered."""
        self._on_gone = tell
        if self.has_gone:
            tell()

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return self.head.headers

    @property
    def body(self) -> bytes:
        """Of a request that came whole."""
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    # The request

    def feed(self, data: bytes) -> None:
        """A part of the body. What comes after the answer is of no use."""
        self.num_fed += len(data)
        if not self.is_answered:
            self._chunks.append(data)
            self.num_bytes += len(data)
            self._wake()

    def has_all(self) -> None:
        """That was the body."""
        self.is_whole = True
        self._wake()

    def hang_up(self) -> None:
        """Nobody is there any more to be answered."""
        self.has_gone = True
        self._wake()
        if self._on_gone is not None:
            self._on_gone()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> Message:
        """The body, in parts as they come; when all of it was told, that nobody is there any more."""
        if self._expects and not (self._chunks or self.is_whole or self.has_begun):
            self._expects = False
            self._connection.write(_CONTINUE)
        while not (self.has_gone or self.is_answered or (not self._was_told and (self._chunks or self.is_whole))):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.has_gone or self.is_answered:
            return _GONE
        body = self.body
        self._chunks, self.num_bytes, self._was_told = [], 0, self.is_whole
        self._connection.took()
        return {"type": "http.request", "body": body, "more_body": not self.is_whole}

    # The answer

    def answer(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """All of it, at once, of a request that no task answers."""
        self._tell(status, headers, body, False)
        self._connection.answered(self)

    async def send(self, message: Message) -> None:
        """A part of the answer."""
        if self._start is None:
            self._start = message
            return
        start, has_more = self._start, message.get("more_body", False)
        self._tell(start["status"], start.get("headers", ()), message.get("body", b""), has_more)
        if has_more and not self.has_gone and self._connection.may_write is not None:
            await self._connection.may_write.wait()

    def _tell(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes, has_more: bool) -> None:
        """The first part of an answer has its head before it."""
        if self.has_gone:
            return
        head = b""
        if not self.has_begun:
            self.has_begun = True
            head = self._begin(status, list(headers), len(body), has_more)
        if self._is_bare:
            body = b""
        elif self._is_chunked:
            body = _chunk(body, has_more)
        if head or body:
            self._connection.write(head + body)
        if not has_more:
            self.is_answered = True
            self._chunks, self.num_bytes, self._on_gone = [], 0, None
            self._wake()

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]], num_bytes: int, has_more: bool) -> bytes:
        """The head of the answer."""
        is_recent = self.head.version == "1.1"
        has_length = any(name == b"content-length" for name, _ in headers)
        self._is_bare = self.head.method == b"HEAD" or status in _BODILESS
        if not (has_length or has_more or status in _BODILESS):
            headers.append((b"content-length", b"%d" % num_bytes))
        elif not (has_length or status in _BODILESS):
            self._is_chunked = is_recent
            self.keeps_alive = self.keeps_alive and is_recent
            headers += [(b"transfer-encoding", b"chunked")] * is_recent
        if self._expects and not self.is_whole:
            self.keeps_alive = False  # whether the body will come is not known
        if CLOSE in headers:
            self.keeps_alive = False
        elif not self.keeps_alive or self._connection.is_last:
            self.keeps_alive = False
            headers.append(CLOSE)
        elif not is_recent:
            headers.append((b"connection", b"keep-alive"))
        return head_of(status, headers)

    def fail(self) -> None:
        """Answer that the app did not."""
        self.keeps_alive = False
        self._tell(500, (), b"", False)


def head_of(status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
    """The lines before a body."""
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return b"".join([line, *(b"%b: %b\r\n" % header for header in headers), b"\r\n"])


def _chunk(body: bytes, has_more: bool) -> bytes:
    part = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    return part if has_more else part + b"0\r\n\r\n"
