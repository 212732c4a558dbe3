"""The Open Inference Protocol v2 over HTTP: which address answers what."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ParamSpec, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor

from shoal.errors import ConfigError
from shoal.job.task import TensorSpec
from shoal.serving.batching import Batcher, Batching, Expired, Overloaded
from shoal.serving.codec import LENGTH_HEADER, Question, decode_request, encode_response
from shoal.serving.predictor import Predictor

_log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
_LARGE_BYTES = 1 << 18

P = ParamSpec("P")
T = TypeVar("T")


def make_app(predictor: Predictor, max_body_bytes: int, batching: Batching | None = None) -> Starlette:
    """An ASGI app that answers for one model, which runs in one thread of its own: health is answered meanwhile.

    Every refusal is ``{"error": reason}``: 400 for a request that cannot be what was meant, 404 for another model,
    version or address, 413 for a body above ``max_body_bytes``, 429 with Retry-After if too many wait, 500 where the
    model fails, 504 if it does not come to a request in its time: its parameter ``timeout``, in microseconds, or 30 s.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="predict")
    at = _Endpoints(predictor, Batcher(predictor.predict, thread, batching), max_body_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        thread.shutdown(cancel_futures=True)

    model, one_version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    routes = [
        *(Route(f"{path}/infer", at.infer, methods=["POST"]) for path in (model, one_version)),
        *(Route(f"{path}/ready", at.model_ready) for path in (model, one_version)),
        *(Route(path, at.model) for path in (model, one_version)),
        Route("/v2/health/live", at.live),
        Route("/v2/health/ready", at.ready),
        Route("/v2", at.server),
    ]
    handlers = {HTTPException: _refuse, ConfigError: _bad, Overloaded: _later, Expired: _too_late}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


@dataclass(frozen=True)
class _Endpoints:
    predictor: Predictor
    batcher: Batcher
    max_body_bytes: int

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        return _json({"ready": True})

    async def server(self, _: Request) -> Response:
        return _json({"name": "shoal", "version": _shoal_version(), "extensions": ["binary_tensor_data"]})

    async def model(self, request: Request) -> Response:
        predictor = self._find(request)
        return _json(
            {
                "name": predictor.name,
                "versions": [str(predictor.version)],
                "platform": "pytorch",
                "inputs": _plain(predictor.inputs),
                "outputs": _plain(predictor.outputs),
            }
        )

    async def model_ready(self, request: Request) -> Response:
        return _json({"name": self._find(request).name, "ready": True})

    async def infer(self, request: Request) -> Response:
        predictor = self._find(request)
        try:
            body = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=400)
        length = request.headers.get(LENGTH_HEADER)
        question = await _off_loop(len(body), decode_request, body, length, predictor.inputs, predictor.outputs)
        try:
            outputs = await self._ask(request, question)
            if outputs is None:
                return Response(status_code=400)  # to nobody
            num_bytes = sum(tensor.nbytes for tensor in outputs.values())
            answer, json_bytes = await _off_loop(
                num_bytes, encode_response, question, predictor.name, predictor.version, outputs
            )
        except (Overloaded, Expired):
            raise
        except Exception as error:
            _log.exception("model %s, version %s, failed on a request", predictor.name, predictor.version)
            raise HTTPException(500, f"the model failed on this request: {type(error).__name__}: {error}") from error
        if json_bytes is None:
            return Response(answer, media_type="application/json")
        return Response(answer, media_type="application/octet-stream", headers={LENGTH_HEADER: str(json_bytes)})

    async def _ask(self, request: Request, question: Question) -> Mapping[str, Tensor] | None:
        """None if whoever asks has hung up."""
        asking = asyncio.ensure_future(self.batcher.ask(question.inputs, question.timeout_s or _TIMEOUT_S))
        leaving = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return await asking if asking.done() else None
        finally:
            asking.cancel()
            leaving.cancel()

    def _find(self, request: Request) -> Predictor:
        name, number = request.path_params["model"], request.path_params.get("version")
        if name != self.predictor.name:
            raise HTTPException(404, f"no model {name!r} is served here, only {self.predictor.name!r}")
        if number not in (None, str(self.predictor.version)):
            raise HTTPException(404, f"model {name!r} is served in version {self.predictor.version}, not {number}")
        return self.predictor

    async def _body(self, request: Request) -> bytes:
        chunks: list[bytes] = []
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            # What is too much is still read, and forgotten: a client that writes hears no answer before it is done.
            if size <= self.max_body_bytes:
                chunks.append(chunk)
        if size > self.max_body_bytes:
            raise HTTPException(
                413, f"a body may have {self.max_body_bytes} bytes, and {size} came: send fewer samples"
            )
        return b"".join(chunks)


async def _off_loop(num_bytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """In a thread if it takes a while, so that others are answered meanwhile."""
    if num_bytes <= _LARGE_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def _plain(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _json({"error": error.detail}, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _later(_: Request, error: Exception) -> Response:
    assert isinstance(error, Overloaded)
    response = _json({"error": error.message}, 429)
    response.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return response


async def _too_late(_: Request, error: Exception) -> Response:
    assert isinstance(error, Expired)
    return _json({"error": error.message}, 504)


async def _bad(_: Request, error: Exception) -> Response:
    assert isinstance(error, ConfigError)
    return _json({"error": error.message}, 400)


def _shoal_version() -> str:
    try:
        return version("shoal")
    except PackageNotFoundError:
        return "unknown"
