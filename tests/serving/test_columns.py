"""Plain JSON at ``/predict``: columns in, columns out."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import torch

from shoal.serving import Limits, ModelPredictor, Server

COLUMNS = {"row": [[1, 2, 3], [4.5, 0, -1]], "times": [1, 10]}


def body(**changes: Any) -> bytes:
    return json.dumps({**COLUMNS, **changes}).encode()


def test_columns_are_answered_with_columns(http: httpx.Client) -> None:
    answer = http.post("/predict", json=COLUMNS)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json() == {"scores": [[14.0, 0.5], [15.0, 22.5]], "best": [0, 1]}


MALFORMED = {
    "an empty body": (b"", "must be an object in JSON, of arrays by the inputs' names"),
    "an array": (b"[1]", "Expected `object`, got `array`"),
    "cut short": (body()[:-1], "Input data was truncated"),
    "not UTF-8": (b'{"\xff": 1}', "must be an object in JSON"),
    "nesting without end": (b'{"row": ' + b"[" * 100_000, "must be an object in JSON"),
    "columns nested without end": (b'{"row": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "must be an object in JSON"),
    "an unknown input": (body(id="a"), "no input 'id': it has row, times"),
    "a missing input": (b'{"row": [[1, 2, 3]]}', "needs the inputs row, times; times did not come"),
    "no samples": (body(row=[[]], times=[]), "shape must be [-1, 3]"),
    "no rows": (body(times=[]), "input 'times': shape must be [-1], where -1 is any number from 1, not [0]"),
    "a flat column": (body(row=[1, 2, 3]), "input 'row': an array nested 2 deep was needed, and it is nested 1 deep"),
    "a number alone": (body(times=3), "nested 1 deep was needed, and it is nested 0 deep"),
    "a column nested too deep": (body(row=[[[1, 2, 3]]]), "it is nested 3 deep"),
    "uneven rows": (body(row=[[1, 2, 3], [1]]), "nested evenly"),
    "a row that is a number": (body(row=[[1, 2, 3], 4]), "Expected `array`, got `int`"),
    "rows that are too wide": (body(row=[[1, 2, 3, 4]]), "shape must be [-1, 3], where -1 is any number from 1, not"),
    "unequal numbers of samples": (body(times=[1]), "row has 2, times has 1"),
    "text for a number": (body(times=["a", 2]), "data must be INT64 values: Expected `int`, got `str`"),
    "a fraction for a whole number": (body(times=[1.5, 2]), "Expected `int`, got `float`"),
    "a number beyond INT64": (body(times=[2**63, 1]), "must fit into INT64"),
    "a number beyond FP32": (body(row=[[1e300, 1, 2], [1, 2, 3]]), "1 of 6 are NaN, infinite or too large"),
    "NaN": (body().replace(b"4.5", b"NaN"), "JSON is malformed"),
}


@pytest.mark.parametrize(("content", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_columns_are_400_with_the_reason(http: httpx.Client, content: bytes, reason: str) -> None:
    answer = http.post("/predict", content=content)
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


def test_columns_do_not_come_as_bytes(http: httpx.Client) -> None:
    answer = http.post("/predict", content=body(), headers={"Inference-Header-Content-Length": "2"})
    assert answer.status_code == 400 and "in JSON alone" in answer.json()["error"]


def test_only_posts_are_answered(http: httpx.Client) -> None:
    answer = http.get("/predict")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_too_many_samples_are_413(predictor: ModelPredictor) -> None:
    with Server(predictor, limits=Limits(max_samples=1)) as server:
        answer = httpx.post(f"{server.url}/predict", json=COLUMNS)
    assert answer.status_code == 413 and "may have 1 samples, and 2 came" in answer.json()["error"]


def test_a_model_that_computes_what_json_cannot_say_is_500(predictor: ModelPredictor) -> None:
    class Broken:
        name, version, inputs, outputs = "broken", 1, predictor.inputs, predictor.outputs

        def predict(self, inputs: object) -> dict[str, torch.Tensor]:
            return {"scores": torch.tensor([[float("inf")], [1.0]]), "best": torch.tensor([0, 0])}

    with Server(Broken()) as server:
        answer = httpx.post(f"{server.url}/predict", json=COLUMNS)
    assert answer.status_code == 500 and "'scores' in JSON: finite numbers were needed" in answer.json()["error"]
