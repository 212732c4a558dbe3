"""Open Inference Protocol v2 over gRPC: requests and responses as its messages.

Tensors come as raw bytes, of all inputs at once, or as typed contents; the answer comes as the question did, unless an
output has a datatype that only raw bytes carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal.errors import ConfigError
from shoal.serving.answering import Answer, Served
from shoal.serving.checks import require_alike, require_all, require_fit, require_known
from shoal.serving.codec import Question, output_of, timeout_of
from shoal.serving.datatypes import Array, datatype_of_array, from_bytes, from_values, to_bytes, to_values
from shoal.serving.limits import Limits
from shoal.serving.messages import message

FIELDS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
"""Where typed contents are. FP16 and BF16 have no field."""


def decode_message(request: Any, model: Served, limits: Limits) -> Question:
    """Read a ``ModelInferRequest``. ``ConfigError`` for everything that the model must not see."""
    for tensor in request.inputs:
        limits.check_samples(tensor.shape[0] if tensor.shape else 0)
    raw = request.raw_input_contents
    values = _read(request.inputs, raw, model)
    names = [spec.name for spec in model.outputs]
    wanted = tuple(output.name for output in request.outputs) or tuple(names)
    require_known("output", wanted, names)
    is_raw = bool(raw) or any(spec.datatype not in FIELDS for spec in model.outputs if spec.name in wanted)
    return Question(
        inputs=values,
        outputs=wanted,
        as_bytes=frozenset(wanted if is_raw else ()),
        id=request.id or None,
        timeout_s=timeout_of(_parameter(request.parameters, "timeout")),
    )


def _parameter(parameters: Any, name: str) -> object:
    if name not in parameters:
        return None
    choice = parameters[name].WhichOneof("parameter_choice")
    return getattr(parameters[name], choice) if choice else ""


def _read(tensors: Sequence[Any], raw: Sequence[bytes], model: Served) -> dict[str, Array]:
    specs = {spec.name: spec for spec in model.inputs}
    require_all([tensor.name for tensor in tensors], specs)
    if raw and len(raw) != len(tensors):
        raise ConfigError(f"raw_input_contents has {len(raw)} entries: one is needed for each of {len(tensors)} inputs")
    values = {}
    for number, tensor in enumerate(tensors):
        try:
            require_fit(tensor.datatype, tensor.shape, specs[tensor.name])
            values[tensor.name] = _value(tensor, raw[number] if raw else None)
        except ConfigError as error:
            raise ConfigError(f"input {tensor.name!r}: {error.message}") from error
    require_alike(values)
    return values


def _value(tensor: Any, blob: bytes | None) -> Array:
    came = [field.name for field, _ in tensor.contents.ListFields()]
    if blob is not None:
        if came:
            raise ConfigError(f"data were given both in {came[0]} and in raw_input_contents")
        return from_bytes(memoryview(blob), tensor.datatype, tensor.shape)
    field = FIELDS.get(tensor.datatype)
    if field is None:
        raise ConfigError(f"{tensor.datatype} comes in raw_input_contents only")
    if came not in ([], [field]):
        raise ConfigError(f"{tensor.datatype} comes in {field} alone, not in {', '.join(came)}")
    return from_values(getattr(tensor.contents, field), tensor.datatype, tensor.shape)


def encode_message(question: Question, model: Served, answer: Answer) -> bytes:
    """A ``ModelInferResponse``, serialized. ``Bug`` if the model did not compute an output that it declares."""
    response = message("ModelInferResponse")(
        model_name=model.name, model_version=str(answer.version), id=question.id or ""
    )
    for name in question.outputs:
        array = output_of(answer.outputs, name)
        datatype = datatype_of_array(array)
        output = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if question.as_bytes:
            response.raw_output_contents.append(to_bytes(array))
        else:
            getattr(output.contents, FIELDS[datatype]).extend(to_values(array))
    encoded: bytes = response.SerializeToString()
    return encoded
