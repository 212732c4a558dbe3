"""A model's addresses within another web application."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import MutableMapping
from typing import IO, TYPE_CHECKING, Any

from shoal.serving.access import Key
from shoal.serving.answering import Alone
from shoal.serving.batching import Batching
from shoal.serving.extra import serve_extra
from shoal.serving.limits import Limits
from shoal.serving.predictor import Predictor

if TYPE_CHECKING:
    import flask

    from shoal.serving.app import App

_CHUNK_BYTES = 1 << 20
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_RULES = ("/v2", "/v2/<path:_>", "/predict", "/metrics", "/openapi.json", "/docs")


def asgi_app(
    predictor: Predictor, limits: Limits | None = None, key: Key | None = None, batching: Batching | None = None
) -> App:
    """To be mounted in an ASGI application: ``app.mount("/models", asgi_app(predictor))`` in FastAPI or Starlette.

    The model computes in a thread of its own. Asked from one event loop only. ``key``: that each request must carry.
    """
    with serve_extra():
        from shoal.serving.app import App
        from shoal.serving.inference import Face
    return App(Face(service=Alone(predictor, batching), limits=limits or Limits(), key=key))


def flask_blueprint(
    predictor: Predictor, limits: Limits | None = None, key: Key | None = None, batching: Batching | None = None
) -> flask.Blueprint:
    """The same addresses in Flask: ``app.register_blueprint(flask_blueprint(predictor), url_prefix="/models")``.

    Requests of all threads go through the model together. What that takes, a thread with an event loop and the model's
    own, begins with the first request, so that a server may fork before. A body is read before it is refused.
    """
    with serve_extra():
        import flask
    bridge = _Bridge(asgi_app(predictor, limits, key, batching), (limits or Limits()).max_body_bytes)
    blueprint = flask.Blueprint("shoal", __name__)

    for rule in _RULES:

        def answer(_: str = "", rule: str = rule, **__: object) -> flask.Response:
            return bridge.answer(flask.request, rule.replace("<path:_>", _))

        name = rule.partition("<")[0].strip("/").replace(".", "_")
        blueprint.add_url_rule(rule, f"{name}_" if "<" in rule else name, answer, methods=_METHODS)
    return blueprint


class _Bridge:
    """From threads that each wait for an answer to an ASGI app in one loop."""

    def __init__(self, app: App, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def answer(self, request: flask.Request, path: str) -> flask.Response:
        """``path``: the request's, from the blueprint's own prefix on."""
        import flask

        exchange = _Exchange(_read(request.stream, self._max_body_bytes))
        asked = self._answer(_scope(request, path), exchange)
        asyncio.run_coroutine_threadsafe(asked, self._running()).result()
        return flask.Response(exchange.body, exchange.status, exchange.headers)

    async def _answer(self, scope: MutableMapping[str, Any], exchange: _Exchange) -> None:
        await self._app(scope, exchange.receive, exchange.send)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="shoal", daemon=True).start()
            return self._loop


def _read(stream: IO[bytes], max_bytes: int) -> bytes:
    """All of it, or one byte more than there may be, which is then refused as any body that is too large."""
    chunks, left = [], max_bytes + 1
    while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


class _Exchange:
    """One request and its answer."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self.status, self.body = 500, b""
        self.headers: list[tuple[str, str]] = []

    async def receive(self) -> MutableMapping[str, Any]:
        if self._body is None:
            await asyncio.Event().wait()  # who hangs up is not seen here
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, event: MutableMapping[str, Any]) -> None:
        if event["type"] == "http.response.start":
            self.status = event["status"]
            self.headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event["headers"]]
        else:
            self.body += event.get("body", b"")


def _scope(request: flask.Request, path: str) -> MutableMapping[str, Any]:
    whole = request.script_root + request.path
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": request.scheme,
        "method": request.method, "path": whole, "root_path": whole.removesuffix(path),
        "query_string": request.query_string, "client": None, "server": None,
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in request.headers],
    }  # fmt: skip
