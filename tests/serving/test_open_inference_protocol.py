"""What a client of the protocol sees, over a real socket."""

from __future__ import annotations

import concurrent.futures
import json
import struct
import threading
from collections.abc import Mapping

import httpx
import pytest
import torch
from torch import Tensor

from shoal.serving import ModelPredictor, Server

ROW = {"name": "row", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4.5, 0, -1]}
TIMES = {"name": "times", "shape": [2], "datatype": "INT64", "data": [1, 10]}
SCORES = {"name": "scores", "shape": [2, 2], "datatype": "FP32", "data": [14.0, 0.5, 15.0, 22.5]}
BEST = {"name": "best", "shape": [2], "datatype": "INT64", "data": [0, 1]}


def test_a_running_server_is_live_and_ready(http: httpx.Client) -> None:
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json() == {"ready": True}


def test_a_server_says_what_it_is(http: httpx.Client) -> None:
    about = http.get("/v2").json()
    assert about["name"] == "shoal" and about["extensions"] == ["binary_tensor_data"]


@pytest.mark.parametrize("path", ["/v2/models/scaled", "/v2/models/scaled/versions/7"])
def test_a_model_says_what_goes_in_and_out(http: httpx.Client, path: str) -> None:
    assert http.get(path + "/ready").json() == {"name": "scaled", "ready": True}
    assert http.get(path).json() == {
        "name": "scaled",
        "versions": ["7"],
        "platform": "pytorch",
        "inputs": [
            {"name": "row", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "times", "datatype": "INT64", "shape": [-1]},
        ],
        "outputs": [
            {"name": "scores", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "best", "datatype": "INT64", "shape": [-1]},
        ],
    }


@pytest.mark.parametrize("path", ["/v2/models/scaled/infer", "/v2/models/scaled/versions/7/infer"])
def test_an_inference_answers_all_outputs(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json={"id": "a1", "inputs": [TIMES, ROW]})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json() == {"model_name": "scaled", "model_version": "7", "id": "a1", "outputs": [SCORES, BEST]}


def test_only_the_wanted_outputs_are_sent(http: httpx.Client) -> None:
    answer = http.post("/v2/models/scaled/infer", json={"inputs": [TIMES, ROW], "outputs": [{"name": "best"}]})
    assert answer.json()["outputs"] == [BEST]


def test_nested_data_mean_the_same_as_flat(http: httpx.Client) -> None:
    nested = {**ROW, "data": [[1, 2, 3], [4.5, 0, -1]]}
    answer = http.post("/v2/models/scaled/infer", json={"inputs": [nested, TIMES]})
    assert answer.json()["outputs"] == [SCORES, BEST]


def test_tensors_travel_as_bytes_both_ways(http: httpx.Client) -> None:
    row = {**{k: v for k, v in ROW.items() if k != "data"}, "parameters": {"binary_data_size": 24}}
    head = json.dumps({"inputs": [row, TIMES], "parameters": {"binary_data_output": True}}).encode()
    body = head + struct.pack("<6f", *ROW["data"])  # type: ignore[misc]
    answer = http.post(
        "/v2/models/scaled/infer", content=body, headers={"Inference-Header-Content-Length": str(len(head))}
    )
    assert answer.headers["content-type"] == "application/octet-stream"
    size = int(answer.headers["Inference-Header-Content-Length"])
    assert [o["parameters"] for o in json.loads(answer.content[:size])["outputs"]] == [
        {"binary_data_size": 16},
        {"binary_data_size": 16},
    ]
    assert struct.unpack("<4f2q", answer.content[size:]) == (14.0, 0.5, 15.0, 22.5, 0, 1)


def test_one_output_alone_may_come_as_bytes(http: httpx.Client) -> None:
    wanted = [{"name": "best", "parameters": {"binary_data": True}}, {"name": "scores"}]
    answer = http.post("/v2/models/scaled/infer", json={"inputs": [ROW, TIMES], "outputs": wanted})
    size = int(answer.headers["Inference-Header-Content-Length"])
    assert json.loads(answer.content[:size])["outputs"][1] == SCORES
    assert struct.unpack("<2q", answer.content[size:]) == (0, 1)


class Blocked:
    """A model that computes until it is let go."""

    name, version = "blocked", 1

    def __init__(self, inner: ModelPredictor) -> None:
        self.inputs, self.outputs, self._inner = inner.inputs, inner.outputs, inner
        self.began, self.go_on = threading.Event(), threading.Event()

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.began.set()
        assert self.go_on.wait(30)
        return self._inner.predict(inputs)


def test_health_is_answered_while_the_model_computes(predictor: ModelPredictor) -> None:
    blocked = Blocked(predictor)
    with Server(blocked) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        pending = pool.submit(httpx.post, f"{server.model_url}/infer", json={"inputs": [ROW, TIMES]})
        assert blocked.began.wait(30)
        try:
            assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
            assert not pending.done()
        finally:
            blocked.go_on.set()
        assert pending.result().json()["outputs"] == [SCORES, BEST]


class Broken(Blocked):
    """A model that fails, or that computes what JSON cannot say."""

    def __init__(self, inner: ModelPredictor, answer: Mapping[str, Tensor] | None) -> None:
        super().__init__(inner)
        self._answer = answer

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self._answer is None:
            raise IndexError("row 9 of 4")
        return self._answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "IndexError: row 9 of 4"),
        ({"scores": torch.tensor([[float("nan")], [1.0]]), "best": torch.tensor([0, 0])}, "1 of 2 are NaN"),
        ({"best": torch.tensor([0, 0])}, "no output 'scores'"),
        ({"best": torch.tensor([0])}, "must count 2 samples"),
        ({"best": torch.tensor([0j, 0j])}, "dtype must be one of"),
    ],
)
def test_a_model_that_fails_answers_500_with_the_reason(
    predictor: ModelPredictor, answer: Mapping[str, Tensor] | None, reason: str
) -> None:
    with Server(Broken(predictor, answer)) as server:
        response = httpx.post(f"{server.model_url}/infer", json={"inputs": [ROW, TIMES]})
        assert response.status_code == 500 and reason in response.json()["error"]
        assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
