"""Ask a server for predictions: this package's, or any that speaks the Open Inference Protocol v2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from shoal.errors import ConfigError, Fault, LinkFault
from shoal.serving.codec import decode_response, encode_request
from shoal.serving.extra import serve_extra


def predict(url: str, inputs: Mapping[str, Any], timeout_s: float = 30.0) -> dict[str, Tensor]:
    """The outputs by name of the model at ``url``, such as ``http://127.0.0.1:8000/v2/models/fashion``.

    ``inputs``: tensors, or what ``torch.as_tensor`` takes, by name; the first axis counts samples. ``ConfigError``
    with the server's reason if it refuses the request, ``Fault`` if the model fails, ``LinkFault`` if no one answers.
    """
    with serve_extra():
        import httpx
    body = encode_request({name: torch.as_tensor(value) for name, value in inputs.items()})
    address = f"{url.rstrip('/')}/infer"
    try:
        response = httpx.post(address, content=body, headers={"Content-Type": "application/json"}, timeout=timeout_s)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(f"a model's address looks like http://127.0.0.1:8000/v2/models/NAME, not {url!r}") from error
    except httpx.TransportError as error:
        raise LinkFault(f"no answer from {address} ({error!r}): is a server running there?") from error
    if response.is_success:
        return decode_response(response.content)
    message = f"{address} answered {response.status_code}: {_reason(response.text)}"
    raise Fault(message) if response.status_code >= 500 else ConfigError(message)


def _reason(text: str) -> str:
    try:
        return str(msgspec.json.decode(text, type=dict[str, Any])["error"])
    except (msgspec.DecodeError, KeyError):
        return text[:200]
