"""HTTP, by the Open Inference Protocol v2 and as plain JSON: which address answers what."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from shoal.errors import ConfigError, Fault
from shoal.job.task import TensorSpec
from shoal.serving.answering import NotReady, Served, find
from shoal.serving.inference import Asked, Face, Inference, OpenInference, PlainColumns, refusal
from shoal.serving.openapi import document, shoal_version

_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class App:
    """An ASGI app that answers for a service, by itself or mounted in another.

    Every refusal is ``{"error": reason}``: 400 for a request that cannot be what was meant, 401 without the key, 404
    for another model, version or address, 413 for what is too large, 429 with Retry-After if too many wait, 500 where
    the model fails, 503 while none is loaded, 504 if it does not come to a request in its time: its parameter
    ``timeout``, in microseconds, or the limit. Health is told to everybody, and so is the page ``/docs``.
    """

    def __init__(self, face: Face) -> None:
        self._infer = Inference(face, OpenInference())
        self._predict = Inference(face, PlainColumns())
        self._others = _others(face)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            inference, name, version = self._find(scope["path"].removeprefix(scope.get("root_path", "")))
            if inference is not None:
                await inference.answer(scope, receive, send, name, version)
                return
        await self._others(scope, receive, send)

    def begin(self, path: str, asked: Asked) -> bool:
        """As ``Quick``: questions to the model."""
        inference, name, version = self._find(path)
        if inference is None:
            return False
        inference.begin(asked, name, version)
        return True

    def _find(self, path: str) -> tuple[Inference | None, str | None, str | None]:
        """What answers there, and the model and version that it is asked for."""
        match path.split("/"):
            case ["", "v2", "models", name, "infer"]:
                return self._infer, name, None
            case ["", "v2", "models", name, "versions", number, "infer"]:
                return self._infer, name, number
            case ["", "predict"]:
                return self._predict, None, None
        return None, None, None


def _others(face: Face) -> Starlette:
    at = _Endpoints(face)
    model, one_version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    routes = [
        *(Route(f"{path}/infer", at.infer, methods=["POST"]) for path in (model, one_version)),
        *(Route(f"{path}/ready", at.model_ready) for path in (model, one_version)),
        *(Route(path, at.model) for path in (model, one_version)),
        Route("/predict", at.infer, methods=["POST"]),
        Route("/v2/health/live", at.live),
        Route("/v2/health/ready", at.ready),
        Route("/v2", at.server),
        Route("/metrics", at.metrics),
        Route("/openapi.json", at.openapi),
        Route("/docs", at.docs),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _refuse, ConfigError: _tell, Fault: _tell})


class _Endpoints:
    def __init__(self, face: Face) -> None:
        self._face = face
        self._page = files("shoal.serving").joinpath("docs.html").read_bytes()

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        is_ready = self._face.service.is_ready()
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    async def server(self, request: Request) -> Response:
        self._check(request)
        return _json({"name": "shoal", "version": shoal_version(), "extensions": ["binary_tensor_data"]})

    async def model(self, request: Request) -> Response:
        model = self._find(request)
        versions = [str(one.version) for one in self._face.service.versions()]
        return _json(
            {
                "name": model.name,
                "versions": versions if "version" not in request.path_params else [str(model.version)],
                "platform": "pytorch",
                "inputs": _plain(model.inputs),
                "outputs": _plain(model.outputs),
            }
        )

    async def model_ready(self, request: Request) -> Response:
        model = self._find(request)
        if not self._face.service.is_ready():
            raise NotReady(f"{model.name} is not ready: ask again later")
        return _json({"name": model.name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """For the methods that are refused; what is posted never comes here."""
        raise HTTPException(405)

    async def metrics(self, request: Request) -> Response:
        self._check(request)
        return Response(self._face.seen.text(), media_type=_METRICS_TYPE)

    async def openapi(self, request: Request) -> Response:
        self._check(request)
        has_key = self._face.key is not None
        return _json(document(find(self._face.service), request.scope.get("root_path", ""), has_key))

    async def docs(self, _: Request) -> Response:
        """Nothing of the model: its page asks for that, with the key if there is one."""
        return Response(self._page, media_type="text/html", headers=_PAGE_HEADERS)

    def _check(self, request: Request) -> None:
        if self._face.key is not None:
            self._face.key.check(request.scope["headers"])

    def _find(self, request: Request) -> Served:
        self._check(request)
        number = request.path_params.get("version")
        return find(self._face.service, request.path_params["model"], number)


def _plain(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _json({"error": error.detail}, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _tell(_: Request, error: Exception) -> Response:
    status, headers, body = refusal(error)
    named = {name.decode(): value.decode() for name, value in headers}
    return Response(body, status, headers=named)
