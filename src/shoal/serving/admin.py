"""The face for who may change what is served: a port of its own, with a key of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shoal.errors import ConfigError, ShoalError
from shoal.serving.access import Denied, Key
from shoal.serving.inference import refusal

_MOST_BYTES = 4096
_PATIENCE_S = 10.0


class Steered(Protocol):
    """What can be steered: see ``shoal.service.Conductor``."""

    def status(self) -> dict[str, Any]: ...

    async def promote(self, version: int | None = None) -> None: ...

    def rollback(self) -> None: ...


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    version: int | None = None


class Notes(Protocol):
    """Where events go."""

    def note(self, kind: str, **fields: Any) -> None: ...


def admin_app(steered: Steered, key: Key, log: Notes) -> Starlette:
    """``GET /status``, ``POST /promote`` with ``{"version": N}`` or nothing, ``POST /rollback``. Each needs the key;
    ``log`` is told who asked for what, and what became of it. 409 for what cannot be done as things are."""

    async def asked(request: Request, version: int | None, what: Callable[[], Awaitable[None]]) -> Response:
        outcome = "done"
        try:
            key.check(request.scope["headers"])
            await what()
        except ShoalError as error:
            outcome = error.message
            if isinstance(error, Denied):
                raise
            raise HTTPException(409, error.message) from error
        finally:
            who = request.client.host if request.client else "unknown"
            log.note("asked", verb=request.url.path.strip("/"), by=who, version=version, outcome=outcome)
        return _json(steered.status())

    async def status(request: Request) -> Response:
        key.check(request.scope["headers"])
        return _json(steered.status())

    async def promote(request: Request) -> Response:
        version = await _version(request)
        return await asked(request, version, lambda: steered.promote(version))

    async def rollback(request: Request) -> Response:
        async def back() -> None:
            steered.rollback()

        return await asked(request, None, back)

    routes = [
        Route("/status", status),
        Route("/promote", promote, methods=["POST"]),
        Route("/rollback", rollback, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _refuse, ShoalError: _tell})


async def _version(request: Request) -> int | None:
    body = b""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MOST_BYTES:
                    raise HTTPException(413, f"a demand has at most {_MOST_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the demand did not come within {_PATIENCE_S} s") from None
    try:
        return msgspec.json.decode(body or b"{}", type=_Wanted).version
    except msgspec.MsgspecError as error:
        raise ConfigError(f'{{"version": N}} was needed: {error}') from error


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code)


async def _tell(_: Request, error: Exception) -> Response:
    status, headers, body = refusal(error)
    return Response(body, status, headers={name.decode(): value.decode() for name, value in headers})
