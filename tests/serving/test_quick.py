"""A request that came whole is answered without a task, in its turn, and whatever becomes of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from shoal.serving.inference import Asked
from tests.serving.test_http1 import LARGE, LAST, PATIENCE_S, Echo, Running, all_of, asked


class Hasty:
    """Answers at once, when it is told to, or not at all, as the path says; others it leaves to the app."""

    def __init__(self) -> None:
        self.kept: list[Asked] = []
        self.is_asked, self.is_told = threading.Event(), threading.Event()
        self.num_begun, self.num_at_once = 0, 0

    def begin(self, path: str, asked: Asked) -> bool:
        match path:
            case "/counts":
                if not self.num_begun:
                    asyncio.get_running_loop().call_soon(self.note)
                self.num_begun += 1
                asked.answer(200, [], b"%d" % self.num_begun)
            case "/now":
                asked.answer(200, [(b"x-kind", b"now")], b"now " + asked.body)
            case "/later":
                self.kept.append(asked)
                asked.on_gone(self.is_told.set)
                self.is_asked.set()
            case "/raises":
                raise ValueError("on purpose")
            case "/answers, and raises":
                asked.answer(200, [], b"answered")
                raise ValueError("on purpose")
            case "/large":
                asked.answer(200, [], LARGE * 32)
            case _:
                return False
        return True

    def note(self) -> None:
        """When it is another's turn."""
        self.num_at_once = self.num_begun

    def answer(self) -> None:
        self.kept.pop(0).answer(200, [], b"later")


@pytest.fixture(name="hasty")
def _hasty() -> Hasty:
    return Hasty()


@pytest.fixture(name="echo")
def _echo(hasty: Hasty) -> Iterator[Running]:
    running = Running(Echo(), hasty)
    yield running
    running.end()
    running.thread.join(PATIENCE_S)


def post(path: bytes, body: bytes = b"", version: bytes = b"1.1", *headers: bytes) -> bytes:
    head = [b"POST %b HTTP/%b" % (path, version), b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*head, b"", body])


CLOSES = b"Connection: close"


def test_it_answers_at_once_and_the_app_is_not_asked(echo: Running) -> None:
    answer = asked(echo, post(b"/now", b"abc", b"1.1", CLOSES))
    assert answer == b"HTTP/1.1 200 OK\r\nx-kind: now\r\ncontent-length: 7\r\nconnection: close\r\n\r\nnow abc"
    assert not echo.app.seen


def test_others_are_the_apps(echo: Running) -> None:
    assert b"GET /now? [] 0:" in asked(echo, b"GET /now HTTP/1.1\r\n\r\n" + LAST)
    assert b"POST /other? [content-length] 3:abc" in asked(echo, post(b"/other", b"abc") + LAST)
    large = post(b"/now", LARGE)
    assert b"POST /now? [content-length] %d:xxx" % len(LARGE) in asked(echo, large + LAST)


def test_a_body_that_comes_later_is_the_apps(echo: Running) -> None:
    with echo.connect() as connection:
        connection.sendall(post(b"/now", b"abc")[:-3])
        assert echo.app.is_asked.wait(PATIENCE_S)
        connection.sendall(b"abc")
        assert connection.recv(1000).endswith(b"POST /now? [content-length] 3:abc")


def test_thousands_that_are_sent_ahead_are_answered_in_order(echo: Running) -> None:
    answer = asked(echo, b"".join(post(b"/now", b"%d" % n) for n in range(5_000)) + LAST)
    found = [int(line.split(b"HTTP")[0][4:]) for line in answer.split(b"\r\n") if line.startswith(b"now ")]
    assert found == list(range(5_000))


def test_who_sends_many_ahead_leaves_others_their_turn(echo: Running, hasty: Hasty) -> None:
    answer = asked(echo, post(b"/counts") * 500 + LAST)
    assert answer.count(b"HTTP/1.1 200 OK") == 501 and hasty.num_begun == 500
    assert 1 <= hasty.num_at_once <= 8


def test_what_is_behind_one_that_waits_waits_too(echo: Running, hasty: Hasty) -> None:
    with echo.connect() as connection:
        connection.sendall(post(b"/later") + post(b"/now", b"abc") + LAST)
        assert hasty.is_asked.wait(PATIENCE_S)
        with echo.connect() as other:
            other.sendall(post(b"/now"))
            assert other.recv(1000).endswith(b"now ")
        assert not echo.app.seen
        echo.call(hasty.answer)
        bodies = [part.split(b"HTTP")[0] for part in all_of(connection).split(b"\r\n\r\n")[1:]]
    assert bodies == [b"later", b"now abc", b"GET /last? [connection] 0:"]


def test_it_is_told_who_hangs_up_and_its_answer_goes_nowhere(echo: Running, hasty: Hasty) -> None:
    with echo.connect() as connection:
        connection.sendall(post(b"/later"))
        assert hasty.is_asked.wait(PATIENCE_S)
    assert hasty.is_told.wait(PATIENCE_S)
    echo.call(hasty.answer)
    assert asked(echo, post(b"/now", b"", b"1.1", CLOSES)).endswith(b"now ")


def test_who_has_gone_before_it_listens_is_told_of_at_once(echo: Running, hasty: Hasty) -> None:
    told = threading.Event()
    with echo.connect() as connection:
        connection.sendall(post(b"/later"))
        assert hasty.is_asked.wait(PATIENCE_S)
    assert hasty.is_told.wait(PATIENCE_S)
    echo.call(hasty.kept[0].on_gone, told.set)
    assert told.wait(PATIENCE_S)


def test_where_it_fails_that_is_500_and_others_are_answered(echo: Running) -> None:
    failed = asked(echo, post(b"/raises") + LAST)
    assert failed == b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    assert b"answered" in asked(echo, post(b"/answers, and raises".replace(b" ", b"%20")) + LAST)
    assert asked(echo, post(b"/now", b"", b"1.1", CLOSES)).endswith(b"now ")


def test_an_older_client_is_told_that_its_connection_stays(echo: Running) -> None:
    stays = post(b"/now", b"", b"1.0", b"Connection: keep-alive") + post(b"/now", b"", b"1.0")
    kept, closed = asked(echo, stays).split(b"HTTP/1.1 200 OK")[1:]
    assert b"connection: keep-alive" in kept and b"connection: close" in closed


def test_what_is_next_waits_until_an_answer_is_read(echo: Running) -> None:
    with echo.connect() as connection:
        connection.sendall(post(b"/large") + LAST)
        echo.until_somebody_does_not_read()
        assert not echo.app.seen
        assert all_of(connection).endswith(b"GET /last? [connection] 0:")


def test_the_end_waits_for_what_was_asked(echo: Running, hasty: Hasty) -> None:
    with echo.connect() as idle, echo.connect() as connection:
        connection.sendall(post(b"/later"))
        assert hasty.is_asked.wait(PATIENCE_S)
        echo.end()
        assert idle.recv(10) == b""
        echo.call(hasty.answer)
        assert all_of(connection).endswith(b"connection: close\r\n\r\nlater")
    echo.thread.join(PATIENCE_S)
    assert not echo.thread.is_alive()
