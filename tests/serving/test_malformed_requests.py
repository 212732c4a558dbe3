"""Every request that cannot be what was meant gets a status and a reason that says what was needed."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from shoal.serving import Limits, ModelPredictor, Server

INFER = "/v2/models/scaled/infer"
ROW = {"name": "row", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
TIMES = {"name": "times", "shape": [1], "datatype": "INT64", "data": [1]}


def row(**changes: Any) -> bytes:
    return json.dumps({"inputs": [{**ROW, **changes}, TIMES]}).encode()


def times(**changes: Any) -> bytes:
    return json.dumps({"inputs": [ROW, {**TIMES, **changes}]}).encode()


def request(**changes: Any) -> bytes:
    return json.dumps({"inputs": [ROW, TIMES], **changes}).encode()


def raw_row(data: bytes) -> bytes:
    return row(data=["DATA"]).replace(b'["DATA"]', data)


MALFORMED = {
    "an empty body": (b"", "must be an inference request in JSON"),
    "not JSON": (b"row=1", "JSON is malformed"),
    "not UTF-8": (b'{"inputs": "\xff"}', "must be an inference request in JSON"),
    "cut short": (request()[:-1], "must be an inference request in JSON: Input data was truncated"),
    "an array": (b"[]", "Expected `object`, got `array`"),
    "no inputs": (b"{}", "missing required field `inputs`"),
    "inputs of another kind": (request(inputs={}), "Expected `array`, got `object` - at `$.inputs`"),
    "an id that is a number": (request(id=3), "$.id"),
    "nesting without end": (b'{"inputs": ' + b"[" * 100_000, "must be an inference request in JSON"),
    "data nested without end": (raw_row(b"[" * 100_000 + b"]" * 100_000), "must be an inference request in JSON"),
    "an input without a name": (request(inputs=[{"shape": [1]}]), "missing required field `name`"),
    "an unknown input": (row(name="rows"), "no input 'rows': it has row, times"),
    "a missing input": (request(inputs=[ROW]), "needs the inputs row, times; times did not come"),
    "an input twice": (request(inputs=[ROW, ROW]), "each input is named once"),
    "an unknown output": (request(outputs=[{"name": "label"}]), "no output 'label': it has scores, best"),
    "an output twice": (request(outputs=[{"name": "best"}] * 2), "each output is named once"),
    "another datatype": (row(datatype="FP64"), "input 'row': datatype must be FP32, not FP64"),
    "an unknown datatype": (row(datatype="BYTES"), "datatype must be FP32, not BYTES"),
    "another shape": (row(shape=[1, 4]), "shape must be [-1, 3], where -1 is any number from 1, not [1, 4]"),
    "another number of axes": (row(shape=[3]), "shape must be [-1, 3]"),
    "no samples": (row(shape=[0, 3], data=[]), "not [0, 3]"),
    "a negative shape": (row(shape=[-1, 3]), "not [-1, 3]"),
    "a shape of fractions": (row(shape=[1.5, 3]), "Expected `int`, got `float`"),
    "fewer values": (row(data=[1, 2]), "shape [1, 3] takes 3 values, and 2 came"),
    "a larger shape": (row(shape=[60_000, 3]), "and 3 came"),
    "unequal numbers of samples": (row(shape=[2, 3], data=[0] * 6), "row has 2, times has 1"),
    "no data": (request(inputs=[{**ROW, "data": None}, TIMES]), "data must be an array"),
    "data left out": (request(inputs=[{k: v for k, v in ROW.items() if k != "data"}, TIMES]), "data are missing"),
    "data that are no array": (row(data="123"), "data must be an array, flat or nested 2 deep"),
    "data nested too deep": (row(data=[[[1, 2, 3]]]), "it is nested 3 deep"),
    "data nested unevenly": (row(shape=[2, 3], data=[[1, 2, 3], [1]]), "nested evenly"),
    "data nested otherwise": (row(data=[[1], [2], [3]]), "nested as [1, 3] was needed, and it is nested as [3, 1]"),
    "text for a number": (row(data=["a", 2, 3]), "data must be FP32 values: Expected `float`, got `str`"),
    "null for a number": (row(data=[None, 2, 3]), "got `null`"),
    "NaN": (raw_row(b"[NaN, 1, 2]"), "JSON is malformed"),
    "infinity": (raw_row(b"[1e999, 1, 2]"), "out of range"),
    "a number beyond FP32": (row(data=[1e300, 1, 2]), "1 of 3 are NaN, infinite or too large"),
    "a fraction for a whole number": (times(data=[1.5]), "Expected `int`, got `float`"),
    "a boolean for a whole number": (times(data=[True]), "got `bool`"),
    "a number beyond INT64": (times(data=[2**63]), "must fit into INT64"),
    "bytes without a length": (row(data=None, parameters={"binary_data_size": 12}), "0 bytes are left"),
}


@pytest.mark.parametrize(("body", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_400_with_the_reason(http: httpx.Client, body: bytes, reason: str) -> None:
    answer = http.post(INFER, content=body)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert reason in answer.json()["error"]


def as_bytes(blob: bytes, size: Any, **changes: Any) -> tuple[bytes, int]:
    plain = {k: v for k, v in ROW.items() if k != "data"}
    head = json.dumps({"inputs": [{**plain, "parameters": {"binary_data_size": size}, **changes}, TIMES]}).encode()
    return head + blob, len(head)


BYTES = {
    "too few bytes": (*as_bytes(b"\0" * 11, 11), "FP32 of shape [1, 3] takes 12 bytes, and 11 came"),
    "fewer than said": (*as_bytes(b"\0" * 11, 12), "binary_data_size is 12, and 11 bytes are left"),
    "more than said": (*as_bytes(b"\0" * 13, 12), "1 bytes follow the last input's data"),
    "a size that is no number": (*as_bytes(b"\0" * 12, True), "binary_data_size is True"),
    "a negative size": (*as_bytes(b"\0" * 12, -1), "binary_data_size is -1"),
    "both ways at once": (*as_bytes(b"\0" * 12, 12, data=[1, 2, 3]), "both in JSON and as bytes"),
    "NaN in bytes": (*as_bytes(b"\xff" * 12, 12), "3 of 3 are NaN"),
    "a length beyond the body": (b"{}", 3, "must be at most the body's 2 bytes, not '3'"),
    "a length that is no number": (b"{}", "two", "not 'two'"),
}


@pytest.mark.parametrize(("body", "length", "reason"), BYTES.values(), ids=BYTES.keys())
def test_malformed_bytes_are_400_with_the_reason(http: httpx.Client, body: bytes, length: Any, reason: str) -> None:
    answer = http.post(INFER, content=body, headers={"Inference-Header-Content-Length": str(length)})
    assert answer.status_code == 400
    assert reason in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", "/v2/models/other", 404, "no model 'other' is served here, only 'scaled'"),
        ("POST", "/v2/models/other/infer", 404, "no model 'other'"),
        ("GET", "/v2/models/scaled/versions/8", 404, "served in version 7, not 8"),
        ("POST", "/v2/models/scaled/versions/8/infer", 404, "served in version 7, not 8"),
        ("GET", "/v3", 404, "Not Found"),
        ("GET", "/v2/models/scaled/infer", 405, "Method Not Allowed"),
    ],
)
def test_an_unknown_address_is_refused_in_json(
    http: httpx.Client, method: str, path: str, status: int, reason: str
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert reason in answer.json()["error"]


def test_a_body_above_the_limit_is_413(predictor: ModelPredictor) -> None:
    with Server(predictor, limits=Limits(max_body_bytes=1_000_000)) as server:
        infer = f"{server.model_url}/infer"
        assert httpx.post(infer, content=request(id="x" * 900_000)).status_code == 200
        answer = httpx.post(infer, content=request(id="x" * 20_000_000))
        assert answer.status_code == 413
        assert "may have 1000000 bytes, and 20000" in answer.json()["error"]


def test_a_million_rows_are_413_before_they_are_read(http: httpx.Client) -> None:
    answer = http.post(INFER, content=row(shape=[1_000_000, 3], data=[[]] * 1_000_000))
    assert answer.status_code == 413
    assert answer.json()["error"] == "a request may have 65536 samples, and 1000000 came: send it in parts"


@pytest.mark.parametrize("begun", [b"", b"{"])
def test_a_slow_client_is_told_so_and_holds_up_nobody(predictor: ModelPredictor, begun: bytes) -> None:
    head = b"POST /v2/models/scaled/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + begun
    with Server(predictor, limits=Limits(timeout_s=0.5)) as server:
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port or 0)) as slow:
            slow.sendall(head)
            assert httpx.post(f"{server.model_url}/infer", content=request()).status_code == 200
            slow.settimeout(20)
            answer = b"".join(iter(lambda: slow.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 408 ") and b"did not come within 0.5 s" in answer


def test_a_server_answers_on_after_every_refusal(http: httpx.Client) -> None:
    for body, _ in MALFORMED.values():
        http.post(INFER, content=body)
    assert http.post(INFER, content=request()).status_code == 200
