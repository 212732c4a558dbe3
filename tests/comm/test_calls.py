"""Questions and answers over real sockets: whole, in any size, encrypted, asked again where a connection was lost."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import numpy as np
import pytest

from shoal.comm import sealing
from shoal.comm.calls import Answerer, Calls
from shoal.comm.keys import JobKey
from shoal.errors import ConfigError, LinkFault

SIZES = [0, 1, 4096, (1 << 16) - 24, 1 << 16, (1 << 16) + 1, 5_000_000]
PATIENCE_S = 20.0


class Echo:
    """Answers each question with its head and body, on a thread of its own; ``silent``: with nothing."""

    def __init__(self, key: JobKey | None, port: int = 0, *, silent: bool = False) -> None:
        self._answerer = Answerer("127.0.0.1", port, key)
        self.address = self._answerer.address
        self.heads: list[bytes] = []
        self._silent = silent
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            question = self._answerer.receive(0.01)
            if question is not None:
                self.heads.append(bytes(question.head))
                if not self._silent:
                    self._answerer.answer(question, bytes(question.head), question.body)
        self._answerer.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def echo(key: JobKey | None, port: int = 0, *, silent: bool = False) -> Iterator[Echo]:
    found = Echo(key, port, silent=silent)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def calls(key: JobKey | None, **addresses: str) -> Iterator[Calls]:
    found = Calls(key, addresses)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(params=["near", "far", "clear"])
def key(request, monkeypatch) -> JobKey | None:
    """``near``: both ends may find that they are within one kernel. ``far``: it shall not matter."""
    if request.param == "far":
        monkeypatch.setenv("SHOAL_ENCRYPT", "always")
    return JobKey.make() if request.param != "clear" else None


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_answered_is_what_was_asked(key, size):
    body = random_bytes(size)
    with echo(key) as there, calls(key, there=there.address) as here:
        head, came = here.wait(here.ask("there", b"head", body[: size // 3], body[size // 3 :]), PATIENCE_S)
    assert bytes(head) == b"head"
    assert bytes(came) == body


def test_many_large_questions_may_be_open_at_a_time(key):
    """Neither side waits for the other to take what it sends."""
    bodies = [random_bytes(4_000_000 + number) for number in range(8)]
    with echo(key) as there, calls(key, there=there.address) as here:
        numbers = [here.ask("there", str(number).encode(), body) for number, body in enumerate(bodies)]
        for number, body in reversed(list(zip(numbers, bodies, strict=True))):
            assert bytes(here.wait(number, PATIENCE_S)[1]) == body
    assert there.heads == [str(number).encode() for number in range(8)]


def until(so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_what_is_large_comes_and_goes_while_nobody_waits(key):
    """More than sockets hold: neither side is asked to do anything meanwhile."""
    body = random_bytes(30_000_000)
    with echo(key) as there, calls(key, there=there.address) as here:
        here.wait(here.ask("there", b"hello"), PATIENCE_S)
        number = here.ask("there", b"large", body, expects=len(body))
        until(lambda: b"large" in there.heads)
        found = []
        until(lambda: bool(found.append(here.answer(number)) or found[-1]))
    assert bytes(found[-1][1]) == body


@pytest.mark.parametrize("length", range(1, 10))
def test_bodies_begin_where_numbers_may(key, length):
    with echo(key) as there, calls(key, there=there.address) as here:
        _, came = here.wait(here.ask("there", b"h" * length, bytes(80)), PATIENCE_S)
    assert np.frombuffer(came, np.int64).flags.aligned


def test_strangers_who_say_nothing_do_not_keep_others_out():
    key = JobKey.make()
    with echo(key) as there, ExitStack() as strangers:
        host, port = there.address.split(":")
        silent = [strangers.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)]
        with calls(key, there=there.address) as here:
            assert bytes(here.wait(here.ask("there", b"hello"), PATIENCE_S)[0]) == b"hello"
        silent[0].settimeout(PATIENCE_S)
        assert silent[0].recv(1) == b"", "the first of them has been hung up on"


def test_several_ask_at_a_time(key):
    with echo(key) as there, calls(key, there=there.address) as one, calls(key, there=there.address) as other:
        numbers = [(who, who.ask("there", name, name * 50_000)) for who, name in ((one, b"one"), (other, b"other"))]
        assert [bytes(who.wait(number, PATIENCE_S)[0]) for who, number in numbers] == [b"one", b"other"]


def test_what_is_large_leaves_once_its_server_is_there_while_nobody_waits(key):
    body = random_bytes(30_000_000)
    with echo(key) as there, calls(key, there=there.address) as here:
        here.ask("there", b"large", body)
        until(lambda: here.take() or here._servers["there"].has_begun)
        until(lambda: b"large" in there.heads)


def test_what_nobody_waits_for_is_not_kept(key):
    with echo(key) as there, calls(key, there=there.address) as here:
        first, second = here.ask("there", b"first"), here.ask("there", b"second")
        here.forget([first])
        here.wait(second, PATIENCE_S)
        assert here.answer(first) is None


@pytest.mark.parametrize(("theirs", "mine"), [("a", "b"), ("a", None), (None, "a")])
def test_who_does_not_hold_the_key_is_not_heard(theirs, mine):
    keys = {"a": JobKey.make(), "b": JobKey.make(), None: None}
    with echo(keys[theirs]) as there:
        with (
            calls(keys[mine], there=there.address) as stranger,
            pytest.raises(LinkFault, match="did not answer within"),
        ):
            stranger.wait(stranger.ask("there", b"let me in"), 1.0)
        assert there.heads == []
        with calls(keys[theirs], there=there.address) as friend:
            assert bytes(friend.wait(friend.ask("there", b"hello"), PATIENCE_S)[0]) == b"hello"


@pytest.mark.parametrize("nonsense", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(100_000), b"\x16\x03\x01" * 500])
def test_nonsense_ends_its_own_connection_only(key, nonsense):
    with echo(key) as there, calls(key, there=there.address) as here:
        host, port = there.address.split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as stranger:
            with suppress(OSError):  # it may be hung up on before all has left
                stranger.sendall(nonsense)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass
            assert bytes(here.wait(here.ask("there", b"hello"), PATIENCE_S)[0]) == b"hello"
        assert there.heads == [b"hello"]


def test_an_open_question_is_asked_again_of_who_takes_the_place(key):
    with calls(key) as here:
        with echo(key, silent=True) as first:
            here.meet("there", first.address)
            number = here.ask("there", b"still here?", b"x" * 1_000_000)
            while not first.heads:
                here.take()
        with echo(key, int(first.address.split(":")[1])):
            assert bytes(here.wait(number, PATIENCE_S)[0]) == b"still here?"


def test_an_open_question_is_asked_again_at_another_address(key):
    with echo(key, silent=True) as first, echo(key) as second, calls(key, there=first.address) as here:
        number = here.ask("there", b"still here?")
        while not first.heads:
            here.take()
        here.meet("there", second.address)
        assert bytes(here.wait(number, PATIENCE_S)[0]) == b"still here?"


def test_a_question_waits_for_who_is_not_there_yet(key):
    with socket.socket() as kept:  # for who comes: it does not listen, and to no one else is the port free
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        port = kept.getsockname()[1]
        with calls(key, there=f"127.0.0.1:{port}") as here:
            number = here.ask("there", b"hello")
            with pytest.raises(LinkFault, match=f"there at 127.0.0.1:{port} did not answer within"):
                here.wait(number, 0.1)
            with echo(key, port):
                assert bytes(here.wait(number, PATIENCE_S)[0]) == b"hello"


@pytest.mark.parametrize("address", ["here", "here:", ":5", "127.0.0.1:99999", "127.0.0.1:x"])
def test_an_address_that_is_none_is_refused(key, address):
    with calls(key) as here, pytest.raises(ConfigError, match="HOST:PORT"):
        here.meet("there", address)


def test_a_port_that_is_taken_is_refused(key):
    with echo(key) as there, pytest.raises(ConfigError, match="is it in use"):
        Answerer("127.0.0.1", int(there.address.split(":")[1]), key)


def test_nothing_of_it_can_be_read_on_the_way(key):
    secret, seen = b"nobody else is to read this " * 1000, bytearray()
    with echo(key) as there, socket.create_server(("127.0.0.1", 0)) as relay:
        host, port = there.address.split(":")

        def copy(source: socket.socket, target: socket.socket) -> None:
            with suppress(OSError):
                while data := source.recv(1 << 16):
                    seen.extend(data)
                    target.sendall(data)

        def stand_between() -> None:
            near, _ = relay.accept()
            with near, socket.create_connection((host, int(port))) as far:
                back = threading.Thread(target=copy, args=(far, near))
                back.start()
                copy(near, far)
                far.shutdown(socket.SHUT_RDWR)
                back.join()

        between = threading.Thread(target=stand_between)
        between.start()
        with calls(key, there=f"127.0.0.1:{relay.getsockname()[1]}") as here:
            assert bytes(here.wait(here.ask("there", b"head", secret), PATIENCE_S)[1]) == secret
        between.join()
    assert len(seen) > 2 * len(secret)
    assert (secret[:64] in seen) is (key is None)


@pytest.fixture
def sent(monkeypatch) -> bytearray:
    """All that this process sends over sockets."""
    seen = bytearray()

    class Seen(socket.socket):
        def send(self, data, *flags):
            seen.extend(data)
            return super().send(data, *flags)

    monkeypatch.setattr(socket, "socket", Seen)
    return seen


SAID = b"this is said to who is near " * 1000
knows_its_place = pytest.mark.skipif(not sealing._BOOT.exists(), reason="this system does not tell which kernel runs")


@knows_its_place
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_does_not_leave_the_kernel_is_in_the_clear(sent, host):
    key = JobKey.make()
    try:
        answerer = Answerer(host, 0, key)
    except ConfigError:
        pytest.skip(f"nothing can listen on {host} here")
    with closing(answerer), calls(key, there=answerer.address) as here:
        assert asked(here, answerer) == SAID
    assert SAID in sent and key.secret.encode() not in sent


@knows_its_place
@pytest.mark.parametrize("first", ["always", ""], ids=["who is called", "who calls"])
def test_it_is_encrypted_if_either_end_says_so(sent, monkeypatch, first):
    key = JobKey.make()
    monkeypatch.setenv("SHOAL_ENCRYPT", first)
    with closing(Answerer("127.0.0.1", 0, key)) as answerer:
        monkeypatch.setenv("SHOAL_ENCRYPT", "" if first else "always")
        with calls(key, there=answerer.address) as here:
            assert asked(here, answerer) == SAID
    assert SAID[:28] not in sent


def test_a_switch_that_says_something_else_is_refused(monkeypatch):
    monkeypatch.setenv("SHOAL_ENCRYPT", "never")
    for use in (lambda key: Answerer("127.0.0.1", 0, key), lambda key: Calls(key, {})):
        with pytest.raises(ConfigError, match=r"SHOAL_ENCRYPT may be always.*it is .never."):
            use(JobKey.make())


@knows_its_place
def test_it_is_encrypted_if_the_ends_are_in_two_places(sent, monkeypatch):
    honest = sealing.place_of
    monkeypatch.setattr(sealing, "place_of", lambda s, *, calls: bytes([calls]) + honest(s, calls=calls)[1:])
    key = JobKey.make()
    with closing(Answerer("127.0.0.1", 0, key)) as answerer, calls(key, there=answerer.address) as here:
        assert asked(here, answerer) == SAID
    assert SAID[:28] not in sent


def asked(here: Calls, answerer: Answerer) -> bytes:
    """What comes back of ``SAID``, by one thread."""
    number = here.ask("there", b"head", SAID)
    deadline_s = time.monotonic() + PATIENCE_S
    while (answer := here.answer(number)) is None and time.monotonic() < deadline_s:
        here.take()
        if (question := answerer.receive(0.001)) is not None:
            answerer.answer(question, b"", bytes(question.body))
    assert answer is not None
    return bytes(answer[1])


@knows_its_place
def test_both_ends_of_one_connection_find_the_same_place_and_nobody_else():
    with socket.create_server(("127.0.0.1", 0)) as server:
        places = []
        for _ in range(2):
            with socket.create_connection(server.getsockname()) as caller, server.accept()[0] as called:
                places.append(sealing.place_of(caller, calls=True))
                assert places[-1] == sealing.place_of(called, calls=False) != sealing.place_of(called, calls=True)
    assert None not in places and places[0] != places[1]


@knows_its_place
@pytest.mark.parametrize("of", ["_BOOT", "_NETWORK"])
def test_another_kernel_or_network_namespace_is_another_place(of, monkeypatch, tmp_path):
    (tmp_path / "other").write_text("00000000-0000-0000-0000-000000000000")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as caller:
        here = sealing.place_of(caller, calls=True)
        monkeypatch.setattr(sealing, of, tmp_path / "other")
        assert here != sealing.place_of(caller, calls=True) is not None
        monkeypatch.setattr(sealing, of, tmp_path / "nothing")
        assert sealing.place_of(caller, calls=True) is None


@knows_its_place
def test_nothing_is_lost_between_the_handshake_and_what_follows(monkeypatch):
    unread: list[int] = []
    real = sealing.Seal.unread
    monkeypatch.setattr(sealing.Seal, "unread", lambda seal: unread.append(len(found := real(seal))) or found)
    random = np.random.default_rng(7)

    class Piecemeal(socket.socket):
        def recv_into(self, buffer):
            return super().recv_into(buffer[: random.integers(1, 600)])

        def send(self, data):
            return super().send(data[: random.integers(1, 600)])

    monkeypatch.setattr(socket, "socket", Piecemeal)
    key = JobKey.make()
    for _ in range(60):
        with closing(Answerer("127.0.0.1", 0, key)) as answerer, calls(key, there=answerer.address) as here:
            assert asked(here, answerer) == SAID
    assert any(unread), "none of these handshakes came together with what follows it"
    assert len(unread) == 2 * 60, "a connection was begun again, for something was lost"


@knows_its_place
def test_an_address_that_is_not_its_own_is_not_near():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as caller:
        caller.bind(("127.0.0.2", 0))
        caller.connect(server.getsockname())
        assert sealing.place_of(caller, calls=True) is None


def test_the_certificate_follows_from_the_key():
    from shoal.comm.tls import context_for

    one, other = JobKey.make(), JobKey.make()
    found = [context_for(k.secret, serves=True).get_ca_certs(binary_form=True) for k in (one, one, other)]
    context_for.cache_clear()
    assert context_for(one.secret, serves=False).get_ca_certs(binary_form=True) == found[0]
    assert found[0] == found[1] != found[2]
