"""What a public client of the protocol, tritonclient, gets over HTTP and gRPC. Skipped where it is not installed.

It is not among the packages for development: its protobuf is another than that of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shoal.serving import ModelPredictor, Server
from shoal.serving.answering import Alone
from shoal.serving.inference import Face
from tests.serving.calling import answering

http = pytest.importorskip("tritonclient.http")
rpc = pytest.importorskip("tritonclient.grpc")
errors = pytest.importorskip("tritonclient.utils")

ROW = np.array([[1, 2, 3], [4.5, 0, -1]], np.float32)
TIMES = np.array([1, 10])
SCORES = [[14.0, 0.5], [15.0, 22.5]]


@pytest.fixture(name="over_http")
def _over_http(server: Server) -> Iterator[Any]:
    with http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(name="over_grpc")
def _over_grpc(predictor: ModelPredictor) -> Iterator[Any]:
    with answering(Face(service=Alone(predictor))) as at, rpc.InferenceServerClient(at) as client:
        yield client


@pytest.fixture(params=["over_http", "over_grpc"], name="client")
def _client(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def inputs(of: Any, row: np.ndarray = ROW, **options: Any) -> list[Any]:
    made = [of.InferInput("row", row.shape, errors.np_to_triton_dtype(row.dtype)), of.InferInput("times", [2], "INT64")]
    for tensor, value in zip(made, (row, TIMES), strict=True):
        tensor.set_data_from_numpy(value, **options)
    return made


def test_a_server_is_live_ready_and_known(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("scaled") and client.is_model_ready("scaled", "7")


def test_metadata_over_http(over_http: Any) -> None:
    assert over_http.get_server_metadata()["name"] == "shoal"
    assert over_http.get_model_metadata("scaled")["inputs"][0] == {"name": "row", "datatype": "FP32", "shape": [-1, 3]}


def test_metadata_over_grpc(over_grpc: Any) -> None:
    assert over_grpc.get_server_metadata().name == "shoal"
    told = over_grpc.get_model_metadata("scaled", as_json=True)
    assert told["versions"] == ["7"] and told["inputs"][0] == {"name": "row", "datatype": "FP32", "shape": ["-1", "3"]}


@pytest.mark.parametrize("is_binary", [False, True], ids=["json", "binary"])
def test_an_inference_over_http(over_http: Any, is_binary: bool) -> None:
    wanted = [http.InferRequestedOutput(name, binary_data=is_binary) for name in ("scores", "best")]
    answer = over_http.infer("scaled", inputs(http, binary_data=is_binary), outputs=wanted, request_id="a1")
    assert answer.as_numpy("scores").tolist() == SCORES and answer.as_numpy("best").tolist() == [0, 1]
    assert answer.get_response()["id"] == "a1" and answer.get_response()["model_version"] == "7"


def test_an_inference_of_all_outputs_over_http(over_http: Any) -> None:
    answer = over_http.infer("scaled", inputs(http), model_version="7", timeout=5_000_000)
    assert answer.as_numpy("scores").tolist() == SCORES


def test_an_inference_over_grpc(over_grpc: Any) -> None:
    answer = over_grpc.infer("scaled", inputs(rpc), request_id="a1", timeout=5_000_000, client_timeout=20)
    assert answer.as_numpy("scores").tolist() == SCORES and answer.as_numpy("best").tolist() == [0, 1]
    assert answer.get_response().id == "a1" and answer.get_response().model_version == "7"


def test_one_output_over_grpc(over_grpc: Any) -> None:
    answer = over_grpc.infer("scaled", inputs(rpc), outputs=[rpc.InferRequestedOutput("best")])
    assert answer.as_numpy("best").tolist() == [0, 1] and answer.as_numpy("scores") is None


@pytest.mark.parametrize(
    ("over", "of", "model", "row", "reason"),
    [
        ("over_http", http, "other", ROW, "no model 'other' is served here"),
        ("over_http", http, "scaled", ROW.astype(np.float64), "datatype must be FP32, not FP64"),
        ("over_http", http, "scaled", ROW[:1], "row has 1, times has 2"),
        ("over_grpc", rpc, "other", ROW, "NOT_FOUND.* no model 'other' is served here"),
        ("over_grpc", rpc, "scaled", ROW.astype(np.float64), "INVALID_ARGUMENT.* datatype must be FP32, not FP64"),
        ("over_grpc", rpc, "scaled", np.full_like(ROW, np.nan), "INVALID_ARGUMENT.* are NaN, infinite"),
    ],
)
def test_a_refusal_has_the_reason(
    request: pytest.FixtureRequest, over: str, of: Any, model: str, row: np.ndarray, reason: str
) -> None:
    with pytest.raises(errors.InferenceServerException, match=reason):
        request.getfixturevalue(over).infer(model, inputs(of, row))
