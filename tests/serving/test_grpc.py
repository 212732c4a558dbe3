"""What a client of the protocol sees over gRPC."""

from __future__ import annotations

import asyncio
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from torch import Tensor

from shoal.errors import ConfigError
from shoal.job import TensorSpec
from shoal.serving import Batching, Limits, ModelPredictor, make_predictor
from shoal.serving.access import Key
from shoal.serving.answering import Alone, Answer, Served
from shoal.serving.datatypes import DTYPES
from shoal.serving.inference import Face
from shoal.serving.messages import message
from shoal.serving.protobuf import FIELDS, decode_message, encode_message
from shoal.serving.rpc import GrpcServer
from shoal.serving.server import Tls
from tests.serving.calling import PATIENCE_S, answering, call, question, raw_question, wait_for
from tests.serving.certificates import certificate
from tests.serving.test_openapi import Free

SECRET = "a-key-of-24-characters-ab"


@pytest.fixture(scope="module", name="face")
def _face(predictor: ModelPredictor) -> Face:
    return Face(service=Alone(predictor))


@pytest.fixture(scope="module", name="channel")
def _channel(face: Face) -> Iterator[grpc.Channel]:
    with answering(face) as at, grpc.insecure_channel(at) as channel:
        yield channel


def refused(channel: grpc.Channel, name: str, request: Any = None, **options: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as error:
        call(channel, name, request, **options)
    return error.value.code().name, error.value.details() or ""


def test_a_server_says_what_it_is(channel: grpc.Channel) -> None:
    assert call(channel, "ServerLive").live
    assert call(channel, "ServerReady").ready
    assert call(channel, "ServerMetadata").name == "shoal"


@pytest.mark.parametrize("version", ["", "7"])
def test_a_model_says_what_goes_in_and_out(channel: grpc.Channel, version: str) -> None:
    assert call(channel, "ModelReady", message("ModelReadyRequest")(name="scaled", version=version)).ready
    told = call(channel, "ModelMetadata", message("ModelMetadataRequest")(name="scaled", version=version))
    assert (told.name, list(told.versions), told.platform) == ("scaled", ["7"], "pytorch")
    assert [(one.name, one.datatype, list(one.shape)) for one in (*told.inputs, *told.outputs)] == [
        ("row", "FP32", [-1, 3]), ("times", "INT64", [-1]), ("scores", "FP32", [-1, 2]), ("best", "INT64", [-1]),
    ]  # fmt: skip


def test_typed_contents_are_answered_with_typed_contents(channel: grpc.Channel) -> None:
    answer = call(channel, "ModelInfer", question(id="a1"))
    assert (answer.model_name, answer.model_version, answer.id) == ("scaled", "7", "a1")
    scores, best = answer.outputs
    assert (scores.name, scores.datatype, list(scores.shape)) == ("scores", "FP32", [2, 2])
    assert list(scores.contents.fp32_contents) == [14.0, 0.5, 15.0, 22.5]
    assert list(best.contents.int64_contents) == [0, 1] and not answer.raw_output_contents


def test_raw_bytes_are_answered_with_raw_bytes(channel: grpc.Channel) -> None:
    answer = call(channel, "ModelInfer", raw_question(model_version="7"))
    scores, best = answer.raw_output_contents
    assert struct.unpack("<4f", scores) == (14.0, 0.5, 15.0, 22.5) and struct.unpack("<2q", best) == (0, 1)
    assert not any(output.HasField("contents") for output in answer.outputs)


def test_only_the_wanted_outputs_are_sent(channel: grpc.Channel) -> None:
    request = question()
    request.outputs.add(name="best")
    assert [output.name for output in call(channel, "ModelInfer", request).outputs] == ["best"]


class Echo(Free):
    """Answers what it is asked."""

    def predict(self, model: object, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return inputs


def test_every_datatype_goes_both_ways_as_raw_bytes() -> None:
    face = Face(service=Alone(make_predictor(Echo(), {}, name="echo", version=1)))  # type: ignore[arg-type]
    request = message("ModelInferRequest")(model_name="echo")
    for name, dtype in DTYPES.items():
        request.inputs.add(name=name, datatype=name, shape=[1, 2])
        request.raw_input_contents.append(b"\1\0" * dtype.itemsize)
    with answering(face) as at, grpc.insecure_channel(at) as channel:
        raw = call(channel, "ModelInfer", request)
    assert raw.raw_output_contents == request.raw_input_contents


@pytest.mark.parametrize("datatype", sorted(DTYPES.keys() - {"FP16", "BF16"}))
def test_a_datatype_that_has_a_field_goes_both_ways_typed(datatype: str) -> None:
    class One:
        name, version = "one", 1
        inputs = outputs = (TensorSpec("x", datatype, (-1,)),)

        def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return inputs

    model = Served.of(One())
    request = message("ModelInferRequest")(model_name="one")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(tensor.contents, FIELDS[datatype]).extend([1, 0])
    asked = decode_message(request, model, Limits())
    answer = message("ModelInferResponse").FromString(encode_message(asked, model, Answer(1, asked.inputs)))
    assert list(getattr(answer.outputs[0].contents, FIELDS[datatype])) == [1, 0]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_one_that_has_none_comes_raw(datatype: str) -> None:
    model = Served("half", 1, (TensorSpec("x", datatype, (-1,)),), ())
    request = message("ModelInferRequest")(model_name="half")
    request.inputs.add(name="x", datatype=datatype, shape=[1]).contents.fp32_contents.append(1)
    with pytest.raises(ConfigError, match=f"{datatype} comes in raw_input_contents only"):
        decode_message(request, model, Limits())


def test_what_is_not_there_is_not_found(channel: grpc.Channel) -> None:
    other, old = message("ModelReadyRequest")(name="other"), message("ModelMetadataRequest")(name="scaled", version="6")
    assert refused(channel, "ModelReady", other) == ("NOT_FOUND", "no model 'other' is served here, only 'scaled'")
    assert refused(channel, "ModelMetadata", old)[0] == "NOT_FOUND"
    assert refused(channel, "ModelInfer", question(model_version="6"))[0] == "NOT_FOUND"


def input_of(number: int, change: Callable[[Any], Any], request: Any = None) -> Any:
    request = request or question()
    change(request.inputs[number])
    return request


def timed(**choice: Any) -> Any:
    request = question()
    request.parameters["timeout"].MergeFrom(message("InferParameter")(**choice))
    return request


def doubled(request: Any) -> Any:
    request.inputs.add().CopyFrom(request.inputs[0])
    return request


MALFORMED = {
    "no message": (b"\xff\xff", "must be a ModelInferRequest"),
    "no inputs": (message("ModelInferRequest")(model_name="scaled"), "row, times did not come"),
    "an input twice": (doubled(question()), "each input is named once"),
    "another datatype": (input_of(0, lambda t: setattr(t, "datatype", "FP64")), "datatype must be FP32, not FP64"),
    "another shape": (input_of(0, lambda t: t.shape.append(1)), "shape must be [-1, 3]"),
    "a shape beyond all": (input_of(0, lambda t: t.shape.__setitem__(0, 2**62)), "may have 65536 samples"),
    "fewer values": (input_of(0, lambda t: t.contents.fp32_contents.pop()), "takes 6 values, and 5 came"),
    "no values": (input_of(0, lambda t: t.ClearField("contents")), "takes 6 values, and 0 came"),
    "another field": (input_of(0, lambda t: t.contents.fp64_contents.append(1)), "FP32 comes in fp32_contents alone"),
    "NaN": (input_of(0, lambda t: t.contents.fp32_contents.__setitem__(0, float("nan"))), "1 of 6 are NaN"),
    "fewer bytes": (raw_question(), "takes 16 bytes, and 15 came"),
    "bytes of one input": (raw_question(), "raw_input_contents has 1 entries"),
    "both ways at once": (raw_question(), "both in int64_contents and in raw_input_contents"),
    "a timeout of no kind": (timed(), "a whole number of microseconds"),
    "a timeout that is text": (timed(string_param="1"), "a whole number of microseconds"),
    "a timeout of nothing": (timed(int64_param=0), "a whole number of microseconds"),
}
MALFORMED["fewer bytes"][0].raw_input_contents[1] = b"\0" * 15
MALFORMED["bytes of one input"][0].raw_input_contents.pop()
MALFORMED["both ways at once"][0].inputs[1].contents.int64_contents.append(1)


@pytest.mark.parametrize(("request_", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_an_invalid_argument(channel: grpc.Channel, request_: Any, reason: str) -> None:
    code, details = refused(channel, "ModelInfer", request_)
    assert code == "INVALID_ARGUMENT" and reason in details


def test_a_reason_of_any_length_is_told(channel: grpc.Channel) -> None:
    request = input_of(0, lambda tensor: setattr(tensor, "name", "ä" * 100_000))
    assert refused(channel, "ModelInfer", request)[0] == "INVALID_ARGUMENT"


def test_small_numbers_come_in_wider_fields_and_must_fit() -> None:
    class Bytes:
        name, version = "bytes", 1
        inputs = outputs = (TensorSpec("x", "UINT8", (-1,)),)

        def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return inputs

    request = message("ModelInferRequest")(model_name="bytes")
    request.inputs.add(name="x", datatype="UINT8", shape=[1]).contents.uint_contents.append(255)
    with answering(Face(service=Alone(Bytes()))) as at, grpc.insecure_channel(at) as channel:
        assert list(call(channel, "ModelInfer", request).outputs[0].contents.uint_contents) == [255]
        request.inputs[0].contents.uint_contents[0] = 256
        assert "must fit into UINT8" in refused(channel, "ModelInfer", request)[1]


def test_who_has_the_key_is_answered_and_health_is_told_to_everybody(predictor: ModelPredictor) -> None:
    face = Face(service=Alone(predictor), key=Key(SECRET))
    with answering(face) as at, grpc.insecure_channel(at) as channel:
        assert call(channel, "ServerLive").live and call(channel, "ServerReady").ready
        for name in ("ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer"):
            assert refused(channel, name)[0] == "UNAUTHENTICATED"
        for pair in (("authorization", f"Bearer {SECRET}"), ("x-api-key", SECRET)):
            assert call(channel, "ModelInfer", question(), metadata=[pair]).outputs
        assert refused(channel, "ModelInfer", b"\xff", metadata=[("x-api-key", "x" * 20)])[1] == "the key is wrong"


def test_a_message_that_is_too_large_is_refused(predictor: ModelPredictor) -> None:
    face = Face(service=Alone(predictor), limits=Limits(max_body_bytes=1000))
    with answering(face) as at, grpc.insecure_channel(at) as channel:
        assert call(channel, "ModelInfer", question()).outputs
        assert refused(channel, "ModelInfer", question(id="x" * 1000))[0] == "RESOURCE_EXHAUSTED"


class Gated:
    """Waits at a gate, and fails on a negative number."""

    name, version = "scaled", 7

    def __init__(self, inner: ModelPredictor) -> None:
        self.inputs, self.outputs, self._inner = inner.inputs, inner.outputs, inner
        self.is_busy, self.gate = threading.Event(), threading.Event()
        self.computed: list[float] = []

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.is_busy.set()
        assert self.gate.wait(PATIENCE_S)
        self.computed += inputs["times"].tolist()
        if bool((inputs["times"] < 0).any()):
            raise IndexError("row 9 of 4")
        return self._inner.predict(inputs)


def times(value: int) -> Any:
    return input_of(1, lambda tensor: tensor.contents.int64_contents.__setitem__(slice(None), [value] * 2))


def later(channel: grpc.Channel, request: Any, **options: Any) -> Any:
    ask = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer", request_serializer=lambda one: one.SerializeToString()
    )
    return ask.future(request, **{"timeout": PATIENCE_S, **options})


def num_over(face: Face) -> int:
    """How many requests were neither answered nor are being answered."""
    found = re.findall(r'shoal_requests_total{face="grpc",status="(?:499|504)"} (\d+)', face.seen.text().decode())
    return sum(map(int, found))


def test_who_has_no_time_left_is_not_computed(predictor: ModelPredictor) -> None:
    model = Gated(predictor)
    face = Face(service=Alone(model))
    hurried = times(3)
    hurried.parameters["timeout"].int64_param = 1000
    with answering(face) as at, grpc.insecure_channel(at) as channel:
        first = later(channel, times(1))
        assert model.is_busy.wait(PATIENCE_S)
        assert refused(channel, "ModelInfer", times(2), timeout=0.2)[0] == "DEADLINE_EXCEEDED"
        assert refused(channel, "ModelInfer", hurried) == (
            "DEADLINE_EXCEEDED", "the model did not come to this request in its time",
        )  # fmt: skip
        wait_for(lambda: num_over(face) == 2)
        model.gate.set()
        assert first.result()
    assert model.computed == [1, 1]


def test_who_cancels_is_not_computed(predictor: ModelPredictor) -> None:
    model = Gated(predictor)
    service = Alone(model)
    face = Face(service=service)
    with answering(face) as at, grpc.insecure_channel(at) as channel:
        first = later(channel, times(1))
        assert model.is_busy.wait(PATIENCE_S)
        gone, patient = later(channel, times(4)), later(channel, times(5))
        wait_for(lambda: service._batcher.num_waiting == 2)
        gone.cancel()
        wait_for(lambda: num_over(face) == 1)
        model.gate.set()
        assert first.result() and patient.result()
    assert model.computed == [1, 1, 5, 5]
    assert 'shoal_requests_total{face="grpc",status="200"} 2.0' in face.seen.text().decode()


def test_who_is_too_many_hears_it_at_once(predictor: ModelPredictor) -> None:
    model = Gated(predictor)
    with answering(Face(service=Alone(model, Batching(max_requests=1)))) as at, grpc.insecure_channel(at) as channel:
        first = later(channel, times(1))
        assert model.is_busy.wait(PATIENCE_S)
        others = [later(channel, times(2)) for _ in range(2)]
        wait_for(lambda: any(one.done() for one in others))
        (refusal,) = [one for one in others if one.done()]
        assert refusal.code().name == "RESOURCE_EXHAUSTED" and "try again later" in refusal.details()
        model.gate.set()
        assert all(one.result() for one in (first, *others) if one is not refusal)


def test_a_model_that_fails_is_internal_and_the_server_answers_on(predictor: ModelPredictor) -> None:
    model = Gated(predictor)
    model.gate.set()
    with answering(Face(service=Alone(model))) as at, grpc.insecure_channel(at) as channel:
        code, details = refused(channel, "ModelInfer", times(-1))
        assert code == "INTERNAL" and "IndexError: row 9 of 4" in details
        assert call(channel, "ModelInfer", times(1)).outputs


class Empty(Alone):
    """Has no model yet."""

    def is_ready(self) -> bool:
        return False

    def versions(self) -> list[Any]:
        return []


def test_while_no_model_is_loaded_it_is_unavailable(predictor: ModelPredictor) -> None:
    with answering(Face(service=Empty(predictor))) as at, grpc.insecure_channel(at) as channel:
        assert not call(channel, "ServerReady").ready
        assert not call(channel, "ModelReady", message("ModelReadyRequest")(name="scaled")).ready
        assert refused(channel, "ModelInfer", question())[0] == "UNAVAILABLE"


def test_a_port_in_use_is_refused(face: Face) -> None:
    with answering(face) as at:
        port = int(at.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"cannot serve gRPC on 127.0.0.1:{port}: .*choose another host or port"):
            asyncio.run(GrpcServer(face, port=port).start())


def test_it_answers_over_tls(face: Face, tmp_path: Path) -> None:
    tls = Tls(*certificate(tmp_path))
    trust = grpc.ssl_channel_credentials(tls.cert.read_bytes())
    with answering(face, tls) as at, grpc.secure_channel(at, trust) as channel:
        assert call(channel, "ModelInfer", question()).outputs


def test_files_that_are_no_certificate_are_refused(face: Face, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("nothing")
    with pytest.raises(ConfigError, match="cannot be used for TLS"):
        asyncio.run(GrpcServer(face, tls=Tls(bad, bad)).start())
