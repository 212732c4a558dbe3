"""Our HTTP/1.1 over real sockets: what a client may send, and what it may not."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shoal.serving.http1 import HttpServer, Quick

PATIENCE_S = 20.0
LARGE = b"x" * (1 << 20)


class Echo:
    """Answers with the method, the path, some headers and the body; or as the path says."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.is_asked = threading.Event()
        self.last = ""
        self.seen: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope["path"])
        self.is_asked.set()
        match scope["path"]:
            case "/fails":
                raise ValueError("on purpose")
            case "/nothing":
                return
            case "/breaks":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
                await send({"type": "http.response.body", "body": b"half", "more_body": True})
            case "/parts":
                await send({"type": "http.response.start", "status": 200, "headers": [(b"x-kind", b"parts")]})
                for part in (b"one ", b"two ", b""):
                    await send({"type": "http.response.body", "body": part, "more_body": bool(part)})
            case "/refuses":
                await self._tell(send, 429, b"full")
            case "/waits":
                await asyncio.to_thread(self.may_go_on.wait, PATIENCE_S)
                await self._tell(send, 200, b"waited")
            case "/watches":
                while (message := await receive())["type"] != "http.disconnect":
                    pass
                self.last = message["type"]
                self.may_go_on.set()
            case "/large":
                await self._tell(send, 200, LARGE * 32)
            case _:
                await self._tell(send, 200, await self._told(scope, receive))

    async def _told(self, scope: Any, receive: Any) -> bytes:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"gone"
            body, more = body + message["body"], message["more_body"]
        headers = b",".join(name for name, _ in scope["headers"])
        target = scope["path"].encode() + b"?" + scope["query_string"]
        return b"%b %b [%b] %d:%b" % (scope["method"].encode(), target, headers, len(body), body[:20])

    async def _tell(self, send: Any, status: int, body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


class Running:
    """A server in a thread."""

    def __init__(self, app: Echo, quick: Quick | None = None) -> None:
        self.app = app
        self.server = HttpServer(app, quick=quick)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self.server.serve(self._listener))

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=PATIENCE_S)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """In its loop."""
        if self.thread.is_alive():
            self._loop.call_soon_threadsafe(function, *args)

    def end(self) -> None:
        self.call(self.server.end)

    def until_somebody_does_not_read(self) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not any(each.may_write for each in list(self.server._connections)):
            assert time.monotonic() < until_s

    def sweep(self, after_s: float) -> None:
        """As the server does each second, as if so many had gone by."""

        async def close() -> None:
            for connection in list(self.server._connections):
                connection.close_if_idle(asyncio.get_running_loop().time() + after_s)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(PATIENCE_S)


@pytest.fixture(name="echo")
def _echo() -> Iterator[Running]:
    running = Running(Echo())
    yield running
    running.app.may_go_on.set()
    running.end()
    running.thread.join(PATIENCE_S)


def all_of(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    chunks = []
    while chunk := connection.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def asked(echo: Running, *parts: bytes) -> bytes:
    """What comes until the server closes, which the last request asks for."""
    with echo.connect() as connection:
        for part in parts:
            connection.sendall(part)
        return all_of(connection)


LAST = b"GET /last HTTP/1.1\r\nConnection: close\r\n\r\n"


def test_a_body_may_come_in_pieces_of_any_size(echo: Running) -> None:
    with echo.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"POST /a%20b?c=d HTTP/1.1\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc":
            connection.sendall(bytes([byte]))
        answer = all_of(connection)
    assert answer == (
        b"HTTP/1.1 200 OK\r\ncontent-length: 52\r\nconnection: close\r\n\r\n"
        b"POST /a b?c=d [content-length,connection] 3:abc"
    ).replace(b"52", b"47")


def test_what_is_sent_ahead_is_answered_in_order(echo: Running) -> None:
    ahead = b"".join(b"POST /%d HTTP/1.1\r\nContent-Length: 1\r\n\r\n%d" % (n, n % 10) for n in range(200))
    answer = asked(echo, ahead + LAST)
    found = [line.split()[1].rstrip(b"?") for line in answer.split(b"\r\n") if line.startswith((b"POST", b"GET"))]
    assert [line.split(b"POST ")[-1].split(b"?")[0] for line in found][-1] == b"/last"
    assert echo.app.seen == [*(f"/{n}" for n in range(200)), "/last"]
    assert answer.count(b"HTTP/1.1 200 OK") == 201


def test_chunks_make_a_body_and_what_trails_it_is_nobodys_header(echo: Running) -> None:
    body = b"3\r\nabc\r\n2\r\nde\r\n0\r\nAuthorization: Bearer stolen\r\n\r\n"
    answer = asked(echo, b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + body + LAST)
    assert b"POST /a? [transfer-encoding] 5:abcde" in answer
    assert b"GET /last? [connection] 0:" in answer


def test_an_answer_in_parts_goes_in_chunks(echo: Running) -> None:
    answer = asked(echo, b"GET /parts HTTP/1.1\r\n\r\n" + LAST)
    parts = b"x-kind: parts\r\ntransfer-encoding: chunked\r\n\r\n4\r\none \r\n4\r\ntwo \r\n0\r\n\r\n"
    assert parts + b"HTTP/1.1 200 OK" in answer


@pytest.mark.parametrize("path", [b"/a", b"/parts"])
def test_head_has_no_body(echo: Running, path: bytes) -> None:
    answer = asked(echo, b"HEAD %b HTTP/1.1\r\n\r\n" % path + LAST)
    assert answer.count(b"\r\n\r\nHTTP/1.1 200 OK") == 1


def test_http_1_0_ends_unless_it_is_asked_to_go_on(echo: Running) -> None:
    assert asked(echo, b"GET /a HTTP/1.0\r\n\r\n").endswith(b"connection: close\r\n\r\nGET /a? [] 0:")
    answer = asked(echo, b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", b"GET /b HTTP/1.0\r\n\r\n")
    assert b"connection: keep-alive\r\n" in answer and answer.endswith(b"GET /b? [] 0:")
    assert asked(echo, b"GET /parts HTTP/1.0\r\n\r\n").endswith(b"connection: close\r\n\r\none two ")


def test_who_waits_to_be_told_to_go_on_is_told(echo: Running) -> None:
    head = b"POST %b HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    with echo.connect() as connection:
        connection.sendall(head % b"/a")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"ab")
        assert all_of(connection).endswith(b"2:ab")


def test_who_is_refused_instead_need_not_send_a_body(echo: Running) -> None:
    head = b"POST /refuses HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    assert asked(echo, head) == (
        b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\nconnection: close\r\n\r\nfull"
    )  # whether the body still comes is not known, so nothing after it is understood


def test_the_rest_of_a_refused_body_is_passed_over(echo: Running) -> None:
    head = b"POST /refuses HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (4 * len(LARGE))
    with echo.connect() as connection:
        connection.sendall(head)
        assert connection.recv(1000).endswith(b"full")
        for _ in range(4):
            connection.sendall(LARGE)
        connection.sendall(LAST)
        assert all_of(connection).endswith(b"GET /last? [connection] 0:")


def test_a_large_body_comes_whole(echo: Running) -> None:
    head = b"POST /a HTTP/1.1\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (16 * len(LARGE))
    assert asked(echo, head, *[LARGE] * 16).endswith(b"%d:%b" % (16 * len(LARGE), b"x" * 20))


@pytest.mark.parametrize(
    "broken",
    [
        b"nonsense\r\n\r\n",
        b"GET /a HTTP/3.9\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /a HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /a HTTP/1.1\r\nA b: c\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_request_is_told_so_and_the_connection_ends(echo: Running, broken: bytes) -> None:
    answer = asked(echo, broken)
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b'{"error":"this is no HTTP request: ' in answer
    assert b"connection: close\r\n" in answer
    assert asked(echo, LAST).endswith(b"0:")


def test_a_body_that_breaks_off_is_refused_and_its_app_told(echo: Running) -> None:
    answer = asked(echo, b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1


def test_what_came_before_nonsense_is_answered(echo: Running) -> None:
    answer = asked(echo, b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\nnonsense\r\n\r\n")
    assert answer.endswith(
        b"GET /a? [] 0:HTTP/1.1 200 OK\r\ncontent-length: 13\r\nconnection: close\r\n\r\nGET /b? [] 0:"
    )
    cut = b"GET /c HTTP/1.1\r\n\r\nPOST /d HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n"
    assert asked(echo, cut).endswith(b"connection: close\r\n\r\nGET /c? [] 0:")
    assert echo.app.seen == ["/a", "/b", "/c"]


def test_a_head_has_a_limit(echo: Running) -> None:
    answer = asked(echo, b"GET /a HTTP/1.1\r\nX: %b" % (b"x" * 70_000))
    assert answer.startswith(b"HTTP/1.1 431 ") and b"at most 65536 bytes" in answer


def test_so_has_what_trails_a_body(echo: Running) -> None:
    head = b"POST /refuses HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    one_by_one = b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n"
    assert asked(echo, head.replace(b"/refuses", b"/a") + one_by_one + LAST).endswith(b"GET /last? [connection] 0:")
    with echo.connect() as connection:
        connection.sendall(head)
        assert connection.recv(1000).endswith(b"full")
        connection.sendall(b"3\r\nabc\r\n0\r\nX: ")
        with pytest.raises(ConnectionError):
            connection.sendall(LARGE * 64)


def test_no_other_protocol_is_spoken(echo: Running) -> None:
    answer = asked(echo, b"GET /a HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nleft")
    assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"GET /a? [connection,upgrade] 0:")


@pytest.mark.parametrize("path", [b"/fails", b"/nothing"])
def test_an_app_that_does_not_answer_is_500(echo: Running, path: bytes) -> None:
    answer = asked(echo, b"GET %b HTTP/1.1\r\n\r\n" % path)
    assert answer == b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def test_an_answer_that_breaks_off_ends_the_connection(echo: Running) -> None:
    assert asked(echo, b"GET /breaks HTTP/1.1\r\n\r\n" + LAST).endswith(b"\r\n\r\nhalf")
    assert echo.app.seen == ["/breaks"]


def test_an_app_is_told_who_hangs_up(echo: Running) -> None:
    with echo.connect() as connection:
        connection.sendall(b"GET /watches HTTP/1.1\r\n\r\n")
        assert echo.app.is_asked.wait(PATIENCE_S)
    assert echo.app.may_go_on.wait(PATIENCE_S) and echo.app.last == "http.disconnect"


def test_the_end_waits_for_what_was_asked(echo: Running) -> None:
    with echo.connect() as idle, echo.connect() as connection:
        connection.sendall(b"GET /waits HTTP/1.1\r\n\r\n")
        assert echo.app.is_asked.wait(PATIENCE_S)
        echo.end()
        assert idle.recv(10) == b""
        with pytest.raises(ConnectionRefusedError):
            echo.connect()
        echo.app.may_go_on.set()
        assert all_of(connection).endswith(b"connection: close\r\n\r\nwaited")
    echo.thread.join(PATIENCE_S)
    assert not echo.thread.is_alive()


def test_who_sends_nothing_or_too_slowly_is_closed(echo: Running) -> None:
    with echo.connect() as idle, echo.connect() as slow, echo.connect() as busy:
        slow.sendall(b"GET /a HT")
        busy.sendall(b"GET /waits HTTP/1.1\r\n\r\n")
        assert echo.app.is_asked.wait(PATIENCE_S)
        idle.sendall(b"GET /a HTTP/1.1\r\n\r\n")
        assert idle.recv(1000).endswith(b"0:")
        echo.sweep(60)
        assert slow.recv(10) == b""
        idle.sendall(b"GET /b HTTP/1.1\r\n\r\n")
        assert idle.recv(1000).endswith(b"GET /b? [] 0:")
        echo.sweep(100)
        assert idle.recv(10) == b""
        echo.app.may_go_on.set()
        assert busy.recv(1000).endswith(b"waited")


def test_who_does_not_read_is_closed(echo: Running) -> None:
    with echo.connect() as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\n\r\n" * 4)
        echo.until_somebody_does_not_read()
        assert echo.app.seen == ["/large"]
        echo.sweep(60)
        assert len(all_of(connection)) < 32 * len(LARGE)
    assert not echo.server._connections
