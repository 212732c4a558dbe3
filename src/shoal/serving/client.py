"""Ask a server for predictions: this package's, or any that speaks the Open Inference Protocol v2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from torch import Tensor

from shoal.errors import ConfigError, Fault, LinkFault
from shoal.serving.codec import decode_datatypes, decode_response, encode_request
from shoal.serving.datatypes import as_arrays, as_tensors
from shoal.serving.extra import serve_extra


def predict(url: str, inputs: Mapping[str, Any], timeout_s: float = 30.0, key: str = "") -> dict[str, Tensor]:
    """The outputs by name of the model at ``url``, such as ``http://127.0.0.1:8000/v2/models/fashion``.

    ``inputs``: tensors or NumPy arrays by name, or nested lists, for which the server is first asked what they are; the
    first axis counts samples. ``key``: the server's, if it wants one. ``ConfigError`` with the server's reason if it
    refuses the request, ``Fault`` if the model fails, ``LinkFault`` if no one answers.
    """
    address = url.rstrip("/")
    values = {**inputs, **as_arrays({name: value for name, value in inputs.items() if isinstance(value, Tensor)})}
    datatypes = {}
    if not all(isinstance(value, np.ndarray) for value in values.values()):
        datatypes = decode_datatypes(_ask("GET", address, None, timeout_s, key))
    return as_tensors(
        decode_response(_ask("POST", f"{address}/infer", encode_request(values, datatypes), timeout_s, key))
    )


def _ask(method: str, address: str, body: bytes | None, timeout_s: float, key: str = "") -> bytes:
    with serve_extra():
        import httpx
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        response = httpx.request(method, address, content=body, headers=headers, timeout=timeout_s)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(
            f"a model's address looks like http://127.0.0.1:8000/v2/models/NAME, not {address!r}"
        ) from error
    except httpx.TransportError as error:
        raise LinkFault(f"no answer from {address} ({error!r}): is a server running there?") from error
    if response.is_success:
        return response.content
    message = f"{address} answered {response.status_code}: {_reason(response.text)}"
    raise Fault(message) if response.status_code >= 500 else ConfigError(message)


def _reason(text: str) -> str:
    try:
        return str(msgspec.json.decode(text, type=dict[str, Any])["error"])
    except (msgspec.DecodeError, KeyError):
        return text[:200]


def demanded(
    method: str, address: str, key: str, demand: Mapping[str, Any] | None = None, timeout_s: float = 180.0
) -> dict[str, Any]:
    """What a service's admin port answers. ``ConfigError`` if it refuses, ``LinkFault`` if it does not answer."""
    body = msgspec.json.encode(demand) if demand is not None else None
    return msgspec.json.decode(_ask(method, address, body, timeout_s, key), type=dict[str, Any])
