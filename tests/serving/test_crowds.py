"""A server that is asked more than it can do says so at once, and forgets who has left or has no time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import islice
from typing import Any

import httpx
import pytest
from torch import Tensor

from shoal.job import TensorSpec
from shoal.serving import Batching, Server
from shoal.serving.answering import Alone
from shoal.serving.app import App
from shoal.serving.inference import Face

BODY = '{"inputs": [{"name": "row", "datatype": "FP32", "shape": [1], "data": [%s]}]%s}'
PATIENCE_S = 20.0


class Gated:
    """Counts what it computes, and waits at a gate first."""

    name, version = "gated", 1
    inputs = outputs = (TensorSpec("row", "FP32", (-1,)),)

    def __init__(self) -> None:
        self.gate, self.is_busy = threading.Event(), threading.Event()
        self.computed: list[float] = []

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.is_busy.set()
        assert self.gate.wait(PATIENCE_S)
        self.computed += inputs["row"].tolist()
        return {"row": inputs["row"] * 2}


@pytest.fixture(name="model")
def _model() -> Iterator[Gated]:
    model = Gated()
    yield model
    model.gate.set()


@pytest.fixture(name="http")
def _http(model: Gated) -> Iterator[httpx.Client]:
    with (
        Server(model, batching=Batching(max_requests=2)) as server,
        httpx.Client(base_url=server.model_url, timeout=PATIENCE_S) as client,
    ):
        yield client
        model.gate.set()


def ask(http: httpx.Client, value: float, more: str = "") -> httpx.Response:
    return http.post("/infer", content=BODY % (value, more))


def crowded(http: httpx.Client, threads: ThreadPoolExecutor, *bodies: str) -> list[Future[httpx.Response]]:
    """Ask with these, of which two may wait while the model is busy: those that do. The others are refused."""
    asked = [threads.submit(http.post, "/infer", content=body) for body in bodies]
    refused = [one.result() for one in islice(as_completed(asked, PATIENCE_S), len(bodies) - 2)]
    for answer in refused:
        assert (answer.status_code, "try again later" in answer.json()["error"]) == (429, True)
        assert int(answer.headers["Retry-After"]) >= 1
    return [one for one in asked if not one.done()]


def test_who_is_too_many_hears_it_at_once_and_when_to_come_again(model, http):
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(ask, http, 0)
        assert model.is_busy.wait(PATIENCE_S)
        waiting = crowded(http, threads, *(BODY % (value, "") for value in range(1, 7)))
        assert len(waiting) == 2
        assert http.get("/ready").status_code == 200
        model.gate.set()
        assert [one.result().status_code for one in (first, *waiting)] == [200] * 3
    assert len(model.computed) == 3
    assert ask(http, 7).json()["outputs"][0]["data"] == [14.0]


def test_who_has_no_time_left_is_told_and_not_computed(model, http):
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(ask, http, 0)
        assert model.is_busy.wait(PATIENCE_S)
        hurried = [threads.submit(ask, http, value, ', "parameters": {"timeout": 1000}') for value in (1, 2)]
        assert [one.result().status_code for one in hurried] == [504, 504]
        model.gate.set()
        assert first.result().status_code == 200
    assert model.computed == [0.0]


@pytest.mark.parametrize("timeout", ["0", "-1", "1.5", '"soon"', "true"])
def test_a_timeout_that_is_none_is_refused(http, model, timeout):
    model.gate.set()
    answer = ask(http, 1, f', "parameters": {{"timeout": {timeout}}}')
    assert answer.status_code == 400 and "a whole number of microseconds" in answer.json()["error"]


def test_who_hangs_up_is_not_computed(model):
    app = App(Face(service=Alone(model)))

    async def asked(value: float, leaves: asyncio.Event) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = []
        events = iter([{"type": "http.request", "body": (BODY % (value, "")).encode(), "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (event := next(events, None)) is not None:
                return event
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def send(event: dict[str, Any]) -> None:
            said.append(event)

        path = "/v2/models/gated/infer"
        await app({"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}, receive, send)
        return said

    async def run() -> None:
        stays, leaves = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(asked(0, stays))
        while not model.is_busy.is_set():
            await asyncio.sleep(0.001)
        gone = asyncio.create_task(asked(1, leaves))
        patient = asyncio.create_task(asked(2, stays))
        await asyncio.sleep(0)
        leaves.set()
        await gone
        model.gate.set()
        assert [(await one)[0]["status"] for one in (first, patient)] == [200, 200]

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
    assert model.computed == [0.0, 2.0]
