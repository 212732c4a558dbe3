"""Open Inference Protocol v2: requests and responses as JSON, or JSON followed by the tensors' bytes.

Protocol: https://github.com/kserve/open-inference-protocol, "Inference"; bytes after Triton's "Binary Tensor Data
Extension". What a request says is checked against the model's inputs before the model sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, Raw, UnsetType

from shoal.errors import Bug, ConfigError
from shoal.job.task import TensorSpec
from shoal.serving.checks import require_alike, require_all, require_fit, require_known
from shoal.serving.datatypes import (
    DTYPES,
    Array,
    Arrays,
    datatype_of_array,
    from_bytes,
    from_json,
    to_bytes,
    to_json,
)
from shoal.serving.limits import Limits

LENGTH_HEADER = "Inference-Header-Content-Length"
"""How many bytes of a body are JSON; tensors' bytes follow. Without it, all are JSON."""

Parameters = dict[str, bool | int | float | str]


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = {}
    data: Raw | UnsetType = UNSET


class _Output(msgspec.Struct, omit_defaults=True):
    """A ``_Tensor`` that is to be encoded."""

    name: str
    shape: Sequence[int]
    datatype: str
    parameters: Parameters = {}
    data: Raw | list[Any] | UnsetType = UNSET


class _Wanted(msgspec.Struct):
    name: str
    parameters: Parameters = {}


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: Parameters = {}
    outputs: list[_Wanted] | None = None


class _Asked(msgspec.Struct):
    """A ``_Request`` that is to be encoded."""

    inputs: list[_Output]


class _Told(msgspec.Struct, omit_defaults=True):
    """A ``_Response`` that is to be encoded."""

    model_name: str
    outputs: list[_Output]
    model_version: str | None = None
    id: str | None = None


class _Response(msgspec.Struct):
    outputs: list[_Tensor]


class _Metadata(msgspec.Struct):
    inputs: list[_Tensor]


_request = msgspec.json.Decoder(_Request)
_response = msgspec.json.Decoder(_Response)
_metadata = msgspec.json.Decoder(_Metadata)


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request: the model's inputs by name, which outputs are wanted, and which of them as bytes.
    ``timeout_s``: how long it may take, if it says so."""

    inputs: dict[str, Array]
    outputs: tuple[str, ...]
    as_bytes: frozenset[str]
    id: str | None
    timeout_s: float | None = None

    @property
    def num_samples(self) -> int:
        return len(next(iter(self.inputs.values())))


def decode_request(
    body: bytes, json_bytes: str | None, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec],
    limits: Limits | None = None,
) -> Question:  # fmt: skip
    """Read a request to a model with these inputs and outputs. ``json_bytes``: the ``LENGTH_HEADER``, if it came.

    ``ConfigError``, with what was needed and what came, for everything that the model must not see.
    """
    head, tail = _split(body, json_bytes)
    try:
        request = _request.decode(head)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"the body must be an inference request in JSON: {error}") from error
    bounds = limits or Limits()
    for tensor in request.inputs:
        bounds.check_samples(tensor.shape[0] if tensor.shape else 0)
    tensors = _read(request.inputs, tail, {spec.name: spec for spec in inputs})
    names, as_bytes = _wanted(request, [spec.name for spec in outputs])
    timeout_s = timeout_of(request.parameters.get("timeout"))
    return Question(inputs=tensors, outputs=names, as_bytes=as_bytes, id=request.id, timeout_s=timeout_s)


def _wanted(request: _Request, known: Sequence[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Which outputs, and which of them as bytes."""
    all_bytes = request.parameters.get("binary_data_output", False)
    if not request.outputs:
        return tuple(known), frozenset(known if all_bytes else ())
    names = tuple(output.name for output in request.outputs)
    require_known("output", names, known)
    return names, frozenset(out.name for out in request.outputs if out.parameters.get("binary_data", all_bytes))


def timeout_of(timeout_us: object) -> float | None:
    """In seconds, from Triton's request parameter, which counts microseconds. ``ConfigError`` if it is none."""
    if timeout_us is not None and (type(timeout_us) is not int or timeout_us < 1):
        raise ConfigError(f"the parameter timeout is a whole number of microseconds from 1, not {timeout_us!r}")
    return None if timeout_us is None else timeout_us / 1e6


def _split(body: bytes, json_bytes: str | None) -> tuple[memoryview, memoryview]:
    view = memoryview(body)
    if json_bytes is None:
        return view, view[len(view) :]
    if not (json_bytes.isascii() and json_bytes.isdigit() and int(json_bytes) <= len(view)):
        raise ConfigError(f"{LENGTH_HEADER} must be at most the body's {len(view)} bytes, not {json_bytes[:20]!r}")
    return view[: int(json_bytes)], view[int(json_bytes) :]


def _read(tensors: Sequence[_Tensor], tail: memoryview, specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    require_all([tensor.name for tensor in tensors], specs)
    values, blob = {}, tail[:0]
    for tensor in tensors:
        if tensor.parameters:
            blob, tail = _blob(tensor, tail)
        try:
            require_fit(tensor.datatype, tensor.shape, specs[tensor.name])
            values[tensor.name] = _value(tensor, blob)
        except ConfigError as error:
            raise ConfigError(f"input {tensor.name!r}: {error.message}") from error
    if len(tail):
        raise ConfigError(f"{len(tail)} bytes follow the last input's data: no binary_data_size speaks of them")
    require_alike(values)
    return values


def _blob(tensor: _Tensor, tail: memoryview) -> tuple[memoryview, memoryview]:
    """The tensor's bytes, and what follows them."""
    size = tensor.parameters.get("binary_data_size", 0)
    if type(size) is not int or not 0 <= size <= len(tail):
        raise ConfigError(f"input {tensor.name!r}: binary_data_size is {size!r}, and {len(tail)} bytes are left")
    return tail[:size], tail[size:]


def _value(tensor: _Tensor, blob: memoryview) -> Array:
    if "binary_data_size" in tensor.parameters:
        if tensor.data is not UNSET:
            raise ConfigError("data were given both in JSON and as bytes")
        return from_bytes(blob, tensor.datatype, tensor.shape)
    if tensor.data is UNSET:
        raise ConfigError("data are missing")
    return from_json(tensor.data, tensor.datatype, tensor.shape)


def encode_response(question: Question, model: str, version: int, outputs: Arrays) -> tuple[bytes, int | None]:
    """The response's body, and how many bytes of it are JSON if tensors' bytes follow (for the ``LENGTH_HEADER``).

    ``Bug`` if the model did not compute an output that it declares; ``ConfigError`` if JSON cannot carry what it did.
    """
    tensors, blobs = [], []
    for name in question.outputs:
        array = output_of(outputs, name)
        blob = to_bytes(array) if name in question.as_bytes else None
        tensors.append(_tensor(name, array, blob))
        blobs.append(blob or b"")
    response = _Told(model_name=model, model_version=str(version), id=question.id, outputs=tensors)
    head = msgspec.json.encode(response)
    return b"".join([head, *blobs]), len(head) if question.as_bytes else None


def output_of(outputs: Arrays, name: str) -> Array:
    """``Bug`` if the model did not compute an output that it declares."""
    if name not in outputs:
        raise Bug(f"the model computed no output {name!r}, only {', '.join(outputs)}")
    return outputs[name]


def _tensor(name: str, array: Array, blob: bytes | None = None) -> _Output:
    plain = _Output(name=name, shape=array.shape, datatype=datatype_of_array(array))
    if blob is not None:
        plain.parameters = {"binary_data_size": len(blob)}
        return plain
    try:
        plain.data = to_json(array)
    except ConfigError as error:
        raise ConfigError(f"{name!r} in JSON: {error.message}") from error
    return plain


def encode_request(inputs: Mapping[str, Any], datatypes: Mapping[str, str]) -> bytes:
    """A request in JSON for all outputs. ``datatypes`` says what inputs that are not arrays, but lists, are.

    ``ConfigError`` for an input of unknown datatype, uneven lists, and dtypes and numbers that cannot be sent.
    """
    tensors = []
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            tensors.append(_tensor(name, value))
            continue
        require_known("input", [name], list(datatypes))
        try:
            shape, data = list(np.shape(value)), Raw(msgspec.json.encode(value))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"input {name!r} must be an array or evenly nested lists of numbers: {error}") from error
        tensors.append(_Output(name=name, shape=shape, datatype=datatypes[name], data=data))
    return msgspec.json.encode(_Asked(inputs=tensors))


def decode_datatypes(body: bytes) -> dict[str, str]:
    """The inputs' datatypes by name, from a model's metadata. ``ConfigError`` if it is none."""
    try:
        return {spec.name: spec.datatype for spec in _metadata.decode(body).inputs}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"a model's metadata in JSON was needed, and something else came: {error}") from error


def decode_response(body: bytes) -> dict[str, Array]:
    """The outputs by name from a response in JSON. ``ConfigError`` if it is none."""
    try:
        outputs = _response.decode(body).outputs
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"an inference response in JSON was needed, and something else came: {error}") from error
    for output in outputs:
        if output.datatype not in DTYPES:
            raise ConfigError(f"output {output.name!r} has the datatype {output.datatype}, which no tensor can hold")
    return {output.name: _value(output, memoryview(b"")) for output in outputs}
