"""A model within another application: FastAPI's kind, and Flask's."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flask
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from torch import Tensor
from werkzeug.serving import make_server

from shoal.errors import ConfigError
from shoal.serving import Batching, Limits, ModelPredictor, asgi_app, flask_blueprint, mounting
from shoal.serving.access import Key
from shoal.serving.answering import Alone
from tests.serving.calling import wait_for
from tests.serving.test_server_and_client import Without

COLUMNS = {"row": [[1, 2, 3], [4.5, 0, -1]], "times": [1, 10]}
ANSWER = {"scores": [[14.0, 0.5], [15.0, 22.5]], "best": [0, 1]}
SECRET = "a-key-of-24-characters-ab"


async def hello(_: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


def asked(app: Any, method: str, path: str, root_path: str = "", **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def test_an_asgi_app_answers_under_a_prefix(predictor: ModelPredictor) -> None:
    app = Starlette(routes=[Route("/", hello), Mount("/models", asgi_app(predictor))])
    assert asked(app, "GET", "/").text == "hello"
    assert asked(app, "POST", "/models/predict", json=COLUMNS).json() == ANSWER
    assert asked(app, "GET", "/models/v2/models/scaled/ready").json() == {"name": "scaled", "ready": True}
    assert asked(app, "POST", "/models/v2/models/scaled/infer", content=b"{}").status_code == 400
    assert asked(app, "GET", "/models/openapi.json").json()["servers"] == [{"url": "/models"}]
    assert asked(app, "GET", "/models/docs").status_code == 200
    assert asked(app, "GET", "/models/nothing").json() == {"error": "Not Found"}


def test_an_asgi_app_answers_behind_a_proxy_that_strips_a_prefix(predictor: ModelPredictor) -> None:
    app = asgi_app(predictor)
    assert asked(app, "GET", "/openapi.json", "/models").json()["servers"] == [{"url": "/models"}]
    assert asked(app, "POST", "/predict", "/models", json=COLUMNS).json() == ANSWER


def test_who_mounts_an_app_may_ask_for_a_key(predictor: ModelPredictor) -> None:
    app = asgi_app(predictor, key=Key(SECRET))
    assert asked(app, "POST", "/predict", json=COLUMNS).status_code == 401
    assert asked(app, "POST", "/predict", json=COLUMNS, headers={"X-API-Key": SECRET}).json() == ANSWER


def within(blueprint: flask.Blueprint, prefix: str | None = None) -> flask.Flask:
    app = flask.Flask("another")
    app.add_url_rule("/", "hello", lambda: "hello")
    app.register_blueprint(blueprint, url_prefix=prefix)
    return app


@pytest.mark.parametrize("prefix", ["", "/models"])
def test_flask_answers_at_the_same_addresses(predictor: ModelPredictor, prefix: str) -> None:
    client = within(flask_blueprint(predictor), prefix or None).test_client()
    assert client.get("/").text == "hello"
    assert client.post(f"{prefix}/predict", json=COLUMNS).json == ANSWER
    assert client.get(f"{prefix}/v2").json["name"] == "shoal"  # type: ignore[index]
    assert client.get(f"{prefix}/v2/health/ready").json == {"ready": True}
    assert client.get(f"{prefix}/openapi.json").json["servers"] == [{"url": prefix or "/"}]  # type: ignore[index]
    assert client.get(f"{prefix}/docs").mimetype == "text/html"
    assert b"shoal_requests_total" in client.get(f"{prefix}/metrics").data
    told = client.get(f"{prefix}/v2/models/scaled").json
    inputs = [{**one, "shape": [1, *one["shape"][1:]]} for one in told["inputs"]]  # type: ignore[index]
    data = {"row": [1, 2, 3], "times": [1]}
    body = {"inputs": [{**one, "data": data[one["name"]]} for one in inputs]}
    answer = client.post(f"{prefix}/v2/models/scaled/infer", json=body)
    assert answer.json["outputs"][0]["data"] == [14.0, 0.5]  # type: ignore[index]


def test_flask_refuses_as_the_server_does(predictor: ModelPredictor) -> None:
    blueprint = flask_blueprint(predictor, Limits(max_body_bytes=1000), Key(SECRET))
    client, key = within(blueprint).test_client(), {"X-API-Key": SECRET}
    assert client.post("/predict", json=COLUMNS).headers["WWW-Authenticate"] == "Bearer"
    for body, status in ((b"{}", 400), (b"x" * 1000, 400), (b"x" * 1001, 413)):
        answer = client.post("/predict", data=body, headers=key)
        assert (answer.status_code, list(answer.json or {})) == (status, ["error"])
    assert client.get("/v2/models/other", headers=key).status_code == 404
    assert client.get("/predict", headers=key).status_code == 405
    assert client.get("/elsewhere").mimetype == "text/html"


class Counting:
    """How many samples it computes at once."""

    name, version = "counting", 1

    def __init__(self, inner: ModelPredictor) -> None:
        self.inputs, self.outputs, self._inner = inner.inputs, inner.outputs, inner
        self.sizes: list[int] = []
        self.is_busy, self.gate = threading.Event(), threading.Event()

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.sizes.append(len(inputs["times"]))
        self.is_busy.set()
        assert self.gate.wait(20)
        return self._inner.predict(inputs)


@pytest.fixture(name="counting")
def _counting(predictor: ModelPredictor) -> Counting:
    return Counting(predictor)


@pytest.fixture(name="alone")
def _alone(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> Alone:
    """What the blueprint asks."""
    alone = Alone(counting, Batching(max_samples=8, max_batch_s=60))
    monkeypatch.setattr(mounting, "Alone", lambda *_: alone)
    return alone


@pytest.fixture(name="url")
def _url(counting: Counting, alone: Alone) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, within(flask_blueprint(counting)), threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_requests_of_flasks_threads_go_through_the_model_together(counting: Counting, alone: Alone, url: str) -> None:
    def ask(times: int) -> Any:
        return httpx.post(f"{url}/predict", json={"row": [[1, 2, 3]], "times": [times]}, timeout=20).json()

    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(ask, 1)
        assert counting.is_busy.wait(20)
        others = [threads.submit(ask, times) for times in range(2, 8)]
        wait_for(lambda: alone._batcher.num_waiting == 6)
        counting.gate.set()
        assert [one.result()["scores"][0][0] for one in (first, *others)] == [14.0 * times for times in range(1, 8)]
    assert counting.sizes == [1, 6]


def test_a_body_may_come_in_chunks(counting: Counting, url: str) -> None:
    counting.gate.set()
    body = iter([b'{"row": [[1, 2, 3]], ', b'"times": [1]}'])
    assert httpx.post(f"{url}/predict", content=body).json() == {"scores": [[14.0, 0.5]], "best": [0]}


def test_without_flask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, predictor: ModelPredictor) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "flask"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without("flask"), *sys.meta_path])
    with pytest.raises(ConfigError, match=r"needs the package flask: pip install 'shoal\[flask\]'"):
        flask_blueprint(predictor)
