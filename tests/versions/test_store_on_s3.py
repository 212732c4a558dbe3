"""The same promises on a server that speaks S3, over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from shoal.errors import ConfigError, StoreFault
from shoal.versions import Snapshot
from shoal.versions.store import Absent, Exists, Store
from tests.versions.racing import winners
from tests.versions.small import snapshot_at, versions_in

pytest.importorskip("s3fs", reason="needs shoal[s3]")
pytest.importorskip("moto.server", reason="needs moto[server]")

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug import Response as Reply
from werkzeug.serving import make_server

Request = dict[str, Any]
_CONFLICT = "<Error><Code>ConditionalRequestConflict</Code><Message>Try again.</Message></Error>"


class Server:
    """A moto server that takes one request at a time, and does what a test's ``meddle`` has it do to each."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self.behave()
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def behave(self) -> None:
        self.meddle: Callable[[Request, Callable[[Request], Reply]], Reply] = lambda request, answer: answer(request)

    def __call__(self, request: Request, start_response: Any) -> Iterable[bytes]:
        with self._lock:
            reply = self.meddle(request, lambda asked: Reply.from_app(self._application, asked, buffered=True))
        return reply(request, start_response)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module", name="running")
def _running() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(name="server")
def _server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name, value in {
        "AWS_ENDPOINT_URL": running.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield running
    running.behave()


@pytest.fixture(name="url")
def _url(server: Server, request: pytest.FixtureRequest) -> str:
    from s3fs import S3FileSystem

    bucket = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    S3FileSystem(skip_instance_cache=True).call_s3("create_bucket", Bucket=bucket)
    return f"s3://{bucket}/runs/one"


def test_what_is_put_is_read_and_replaced_and_listed_and_deleted_on_s3(url):
    store = Store(url)
    store.put("a/b/one", b"12", memoryview(b"34"), b"")
    store.put("a/two", b"")
    assert store.read("a/b/one") == b"1234" and store.read("a/two") == b""
    store.put("a/b/one", b"5")
    assert store.read("a/b/one") == b"5" and store.list("a") == ["b", "two"] and store.list("a/b") == ["one"]
    store.delete("a/b")
    store.delete("a/two")
    store.delete("a/two")
    assert store.list("a") == [] == store.list("never")
    with pytest.raises(Absent):
        store.read("a/two")


def test_a_name_on_s3_is_created_once_and_seen_at_once_by_others(url):
    store, other = Store(url), Store(url)
    assert other.list("g") == []
    store.create("g/1", b"first")
    assert other.list("g") == ["1"]
    for again in (other, store):
        with pytest.raises(Exists):
            again.create("g/1", b"second")
    assert store.read("g/1") == b"first"


def test_a_server_that_ignores_conditions_is_refused(url, server):
    server.meddle = lambda request, answer: answer({**request, "HTTP_IF_NONE_MATCH": ""})
    with pytest.raises(ConfigError, match="ignores If-None-Match, so it cannot keep one history"):
        Store(url).create("g/1", b"")


def test_a_creation_whose_answer_was_lost_is_still_ours(url, server):
    lost = []

    def lose_the_first(request: Request, answer: Callable[[Request], Reply]) -> Reply:
        reply = answer(request)
        if "HTTP_IF_NONE_MATCH" in request and not lost:
            lost.append(reply.status_code)
            return Reply(status=503)
        return reply

    server.meddle = lose_the_first
    Store(url).create("g/1", b"ours")
    assert lost == [200]
    with pytest.raises(Exists):
        Store(url).create("g/1", b"theirs")


def test_a_conflict_of_two_conditional_puts_is_tried_again(url, server):
    left = [_CONFLICT, _CONFLICT]

    def conflict_twice(request: Request, answer: Callable[[Request], Reply]) -> Reply:
        if "HTTP_IF_NONE_MATCH" in request and left:
            return Reply(left.pop(), status=409, mimetype="application/xml")
        return answer(request)

    server.meddle = conflict_twice
    Store(url).create("g/1", b"ours")
    assert not left and Store(url).read("g/1") == b"ours"


def test_of_processes_that_create_one_name_on_s3_exactly_one_wins(url):
    won = winners(url, num_racers=3, num_names=5)
    assert won == [(number, Store(url).read(f"g/{number}")) for number in range(5)]


def test_versions_on_s3_are_written_read_and_pruned(url):
    versions = versions_in(url, keep_last=2)
    for step in (1, 2, 3):
        versions.write(snapshot_at(step))
    assert versions.steps() == [2, 3] and Store(url).list("versions") == ["0000000002", "0000000003"]
    assert versions.read().meta == snapshot_at(3).meta


def test_a_large_tensor_goes_to_s3_in_parts(url, server):
    uploads = []

    def count(request: Request, answer: Callable[[Request], Reply]) -> Reply:
        uploads.extend(["part"] if "partNumber" in request["QUERY_STRING"] else [])
        return answer(request)

    server.meddle = count
    versions = versions_in(url)
    tensor = torch.arange(30 << 20, dtype=torch.int32)
    versions.write(Snapshot(1, {"w": tensor}, {}, {"fingerprint": "0" * 16}))
    assert len(uploads) > 1 and torch.equal(versions.read().model["w"], tensor)


def test_a_bucket_that_is_not_there_is_told(server):
    with pytest.raises(StoreFault, match="s3://no-such-bucket/x"):
        Store("s3://no-such-bucket").put("x", b"1")
    with pytest.raises(StoreFault, match="s3://no-such-bucket/x"):
        Store("s3://no-such-bucket").create("x", b"1")


def test_a_server_that_is_not_there_is_told(url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreFault, match=r"127\.0\.0\.1:9"):
        Store(url).create("x", b"1")
