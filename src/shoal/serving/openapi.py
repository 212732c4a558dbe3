"""The HTTP interface as an OpenAPI 3.1 document, made from the served model's own inputs and outputs.

Its examples are requests that are answered: one sample of zeros, which is what the model was tried with.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from shoal.job.task import TensorSpec
from shoal.serving.answering import Served
from shoal.serving.codec import LENGTH_HEADER
from shoal.serving.datatypes import ARRAY_DTYPES, DTYPES, Array, to_json, to_nested
from shoal.serving.layout import FREE_SIZE

Json = dict[str, Any]

_PROTOCOL = {
    "description": "The Open Inference Protocol",
    "url": "https://github.com/open-inference/open-inference-protocol",
}
_REFUSALS = {
    400: "The request cannot be what was meant.",
    401: "The key is missing or wrong.",
    404: "No such model, or version, is served here.",
    408: "The body did not come in time.",
    413: "The request has too many bytes or samples.",
    429: "Too many requests wait.",
    500: "The model failed on this request.",
    503: "No model is loaded yet, or none any more.",
    504: "The model did not come to this request in its time.",
}
_WITH_RETRY = (429, 503)
_JSON, _BYTES = "application/json", "application/octet-stream"


def document(model: Served, prefix: str, has_key: bool) -> Json:
    """``prefix``: where the addresses begin, if not at the root. ``has_key``: whether one must be sent."""
    here = f"/v2/models/{quote(model.name, safe='')}"
    document: Json = {
        "openapi": "3.1.0",
        "info": {"title": model.name, "version": str(model.version), "description": "Predictions of a trained model."},
        "externalDocs": _PROTOCOL,
        "servers": [{"url": prefix or "/"}],
        "paths": {
            "/predict": {"post": _predict()},
            f"{here}/infer": {"post": _infer()},
            here: {"get": _get("The model's inputs and outputs", "Model", 404, 503)},
            f"{here}/ready": {"get": _get("Whether this model answers", "ModelReady", 404, 503)},
            "/v2": {"get": _get("What this server is", "Server")},
            "/v2/health/live": {"get": _open(_get("Whether the server is up", "Live"))},
            "/v2/health/ready": {"get": _open(_ready())},
            "/metrics": {"get": _metrics()},
        },
        "components": {"schemas": _schemas(model), "responses": {_name(s): _refusal(s) for s in _REFUSALS}},
    }
    if has_key:
        schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
        schemes["key"] = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
        document["components"]["securitySchemes"] = schemes
        document["security"] = [{"bearer": []}, {"key": []}]
    return document


def plain_example(model: Served) -> Json:
    """A request to ``/predict`` that is answered."""
    return {spec.name: to_nested(_zeros(spec)) for spec in model.inputs}


def protocol_example(model: Served) -> Json:
    """A request of the Open Inference Protocol that is answered."""
    tensors = [(spec, _zeros(spec)) for spec in model.inputs]
    return {
        "inputs": [
            {"name": spec.name, "datatype": spec.datatype, "shape": list(zeros.shape), "data": to_json(zeros)}
            for spec, zeros in tensors
        ]
    }


def shoal_version() -> str:
    """As it is installed."""
    try:
        return version("shoal")
    except PackageNotFoundError:
        return "unknown"


def _zeros(spec: TensorSpec) -> Array:
    shape = (1, *(FREE_SIZE if size == -1 else size for size in spec.shape[1:]))
    return np.zeros(shape, ARRAY_DTYPES[spec.datatype])


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


def _content(schema: str) -> Json:
    return {_JSON: {"schema": _ref("schemas", schema)}}


def _name(status: int) -> str:
    return f"Error{status}"


def _refusal(status: int) -> Json:
    response: Json = {"description": _REFUSALS[status], "content": _content("Error")}
    if status in _WITH_RETRY:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return response


def _responses(answer: Json, *refusals: int) -> Json:
    return {"200": answer, **{str(status): _ref("responses", _name(status)) for status in refusals}}


def _get(summary: str, schema: str, *refusals: int) -> Json:
    answer = {"description": summary, "content": _content(schema)}
    return {"summary": summary, "operationId": f"get{schema}", "responses": _responses(answer, 401, *refusals)}


def _open(operation: Json) -> Json:
    """For everybody: without a key."""
    del operation["responses"]["401"]
    return {**operation, "security": []}


def _ready() -> Json:
    operation = _get("Whether a request would be answered", "Ready")
    operation["responses"]["503"] = {"description": "It would not.", "content": _content("Ready")}
    return operation


def _metrics() -> Json:
    operation = _get("Metrics for Prometheus", "Metrics")
    operation["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return operation


def _predict() -> Json:
    return {
        "summary": "Predict from columns of samples",
        "operationId": "predict",
        "requestBody": {"required": True, "content": _content("PredictRequest")},
        "responses": _responses(
            {"description": "Each output, a value a sample.", "content": _content("PredictResponse")}, *_REFUSALS
        ),
    }


def _infer() -> Json:
    bytes_follow = {_BYTES: {"schema": {"type": "string", "format": "binary"}}}
    header = {"schema": {"type": "integer", "minimum": 0}, "description": "How many bytes of the body are JSON."}
    answer = {
        "description": "The outputs that were wanted, or all.",
        "content": {**_content("InferResponse"), **bytes_follow},
        "headers": {LENGTH_HEADER: header},
    }
    return {
        "summary": "Predict by the Open Inference Protocol",
        "description": "Tensors travel in JSON, or as bytes behind it: the protocol's binary tensor data extension.",
        "operationId": "infer",
        "parameters": [{"name": LENGTH_HEADER, "in": "header", **header}],
        "requestBody": {"required": True, "content": {**_content("InferRequest"), **bytes_follow}},
        "responses": _responses(answer, *_REFUSALS),
    }


def _schemas(model: Served) -> Json:
    return {
        "Error": _object({"error": {"type": "string"}}),
        "Live": _object({"live": {"type": "boolean"}}),
        "Ready": _object({"ready": {"type": "boolean"}}),
        "ModelReady": _object({"name": {"type": "string"}, "ready": {"type": "boolean"}}),
        "Server": _object({"name": {"type": "string"}, "version": {"type": "string"}, "extensions": _list("string")}),
        "Model": _object(
            {
                "name": {"type": "string"}, "versions": _list("string"), "platform": {"type": "string"},
                "inputs": {"type": "array", "items": _ref("schemas", "Spec")},
                "outputs": {"type": "array", "items": _ref("schemas", "Spec")},
            }
        ),
        "Spec": _object({"name": {"type": "string"}, "datatype": {"enum": [*DTYPES]}, "shape": _list("integer")}),
        "PredictRequest": {**_columns(model.inputs), "examples": [plain_example(model)]},
        "PredictResponse": _columns(model.outputs),
        "InferRequest": {**_infer_request(model), "examples": [protocol_example(model)]},
        "InferResponse": {
            **_object({"model_name": {"const": model.name}, "outputs": _tensors(model.outputs)}),
            "properties": {
                "model_name": {"const": model.name}, "model_version": {"type": "string"}, "id": {"type": "string"},
                "outputs": _tensors(model.outputs),
            },
        },
    }  # fmt: skip


def _object(properties: Json) -> Json:
    return {"type": "object", "required": [*properties], "properties": properties}


def _list(kind: str) -> Json:
    return {"type": "array", "items": {"type": kind}}


def _columns(specs: Sequence[TensorSpec]) -> Json:
    return {**_object({spec.name: _nested(spec) for spec in specs}), "additionalProperties": False}


def _infer_request(model: Served) -> Json:
    inputs = {**_tensors(model.inputs), "minItems": len(model.inputs), "maxItems": len(model.inputs)}
    wanted = _object({"name": {"enum": [spec.name for spec in model.outputs]}})
    parameters = {"timeout": {"type": "integer", "minimum": 1, "description": "Microseconds."}}
    optional = {
        "id": {"type": "string"},
        "parameters": {"type": "object", "properties": {**parameters, "binary_data_output": {"type": "boolean"}}},
        "outputs": {"type": "array", "items": wanted},
    }
    return {"type": "object", "required": ["inputs"], "properties": {"inputs": inputs, **optional}}


def _tensors(specs: Sequence[TensorSpec]) -> Json:
    return {"type": "array", "items": {"anyOf": [_tensor(spec) for spec in specs]}}


def _tensor(spec: TensorSpec) -> Json:
    sizes = {"minItems": len(spec.shape), "maxItems": len(spec.shape), "description": f"{list(spec.shape)}"}
    shape = {"type": "array", "items": {"type": "integer", "minimum": 1}, **sizes}
    flat = {"type": "array", "items": _number(spec.datatype), "description": "In row-major order."}
    parameters = {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}}
    required = {"name": {"const": spec.name}, "datatype": {"const": spec.datatype}, "shape": shape}
    optional = {"data": {"anyOf": [flat, _nested(spec)]}, "parameters": parameters}
    return {"type": "object", "required": [*required], "properties": {**required, **optional}}


def _nested(spec: TensorSpec) -> Json:
    schema = _number(spec.datatype)
    for size in reversed(spec.shape):
        bounds = {"minItems": 1} if size == -1 else {"minItems": size, "maxItems": size}
        schema = {"type": "array", "items": schema, **bounds}
    return schema


def _number(datatype: str) -> Json:
    dtype = DTYPES[datatype]
    if dtype == torch.bool:
        return {"type": "boolean"}
    if dtype.is_floating_point:
        return {"type": "number", "minimum": torch.finfo(dtype).min, "maximum": torch.finfo(dtype).max}
    return {"type": "integer", "minimum": torch.iinfo(dtype).min, "maximum": torch.iinfo(dtype).max}
