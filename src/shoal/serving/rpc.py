"""The Open Inference Protocol v2 over gRPC, in the event loop that also answers over HTTP."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

from shoal.errors import ConfigError
from shoal.serving.answering import NotReady, find
from shoal.serving.extra import serve_extra
from shoal.serving.inference import Face, ask, encoded_by, off_loop, size_of, status_of
from shoal.serving.openapi import shoal_version
from shoal.serving.seen import Record
from shoal.serving.server import Tls

with serve_extra():
    import grpc
    from google.protobuf.message import DecodeError

    from shoal.serving.messages import message
    from shoal.serving.protobuf import decode_message, encode_message

_SERVICE = "inference.GRPCInferenceService"
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_MOST_REASON_BYTES = 2000
"""Of a refusal: it travels among the headers, which are bounded."""


class GrpcServer:
    """``port`` 0 takes a free one; ``start`` says which. ``start`` and ``stop`` are called within one event loop.

    What is refused has the status that HTTP's answers correspond to: INVALID_ARGUMENT, UNAUTHENTICATED (the key is
    metadata, ``authorization`` or ``x-api-key``), NOT_FOUND, RESOURCE_EXHAUSTED if too many wait, INTERNAL where the
    model fails, UNAVAILABLE while none is loaded, DEADLINE_EXCEEDED: a request has as long as its deadline and its
    parameter ``timeout`` leave it, or the limit if it has neither. One that is cancelled is not computed. Health is
    told to everybody.
    """

    def __init__(self, face: Face, host: str = "127.0.0.1", port: int = 0, tls: Tls | None = None) -> None:
        self.port = port
        self._face, self._host, self._tls = face, host, tls
        self._server: Any = None

    async def start(self) -> None:
        """``ConfigError`` if the address cannot be had, or the TLS files are none."""
        credentials = _credentials(self._tls) if self._tls else None
        server = grpc.aio.server(options=_options(self._face))
        server.add_generic_rpc_handlers((_handlers(self._face),))
        at = f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"
        try:
            if credentials is None:
                self.port = server.add_insecure_port(at)
            else:
                self.port = server.add_secure_port(at, credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot serve gRPC on {at}: {error}; choose another host or port") from error
        await server.start()
        self._server = server

    async def stop(self, grace_s: float) -> None:
        """Take no more, and wait so long for what is being answered."""
        if self._server is not None:
            await self._server.stop(grace_s)


def _options(face: Face) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", face.limits.max_body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # else a port that is taken could be had
    ]


def _credentials(tls: Tls) -> Any:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(tls.cert, tls.key)
        pair = (tls.key.read_bytes(), tls.cert.read_bytes())
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{tls.cert} and its key cannot be used for TLS: {error}") from error
    return grpc.ssl_server_credentials([pair])


def _handlers(face: Face) -> Any:
    calls = _Calls(face)
    answers: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {
        "ServerLive": calls.server_live,
        "ServerReady": calls.server_ready,
        "ServerMetadata": calls.server_metadata,
        "ModelReady": calls.model_ready,
        "ModelMetadata": calls.model_metadata,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _told(answer), message(f"{name}Request").FromString, message(f"{name}Response").SerializeToString
        )
        for name, answer in answers.items()
    }
    # Its messages stay bytes until it is known who asks, and large ones are read in a thread.
    handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(calls.model_infer)
    return grpc.method_handlers_generic_handler(_SERVICE, handlers)


def _told(answer: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await answer(request, context)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            return await _refuse(context, *status_of(error))

    return call


async def _refuse(context: Any, status: int, reason: str) -> None:
    details = reason.encode()[:_MOST_REASON_BYTES].decode(errors="ignore")
    await context.abort(_CODES[status], details)


class _Calls:
    def __init__(self, face: Face) -> None:
        self._face = face

    async def server_live(self, _: Any, __: Any) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def server_ready(self, _: Any, __: Any) -> Any:
        return message("ServerReadyResponse")(ready=self._face.service.is_ready())

    async def server_metadata(self, _: Any, context: Any) -> Any:
        self._check(context)
        return message("ServerMetadataResponse")(name="shoal", version=shoal_version())

    async def model_ready(self, request: Any, context: Any) -> Any:
        self._check(context)
        try:
            find(self._face.service, request.name, request.version or None)
        except NotReady:
            return message("ModelReadyResponse")(ready=False)
        return message("ModelReadyResponse")(ready=self._face.service.is_ready())

    async def model_metadata(self, request: Any, context: Any) -> Any:
        self._check(context)
        model = find(self._face.service, request.name, request.version or None)
        versions = [model] if request.version else self._face.service.versions()
        response = message("ModelMetadataResponse")(
            name=model.name, versions=[str(one.version) for one in versions], platform="pytorch"
        )
        for tensors, specs in ((response.inputs, model.inputs), (response.outputs, model.outputs)):
            for spec in specs:
                tensors.add(name=spec.name, datatype=spec.datatype, shape=spec.shape)
        return response

    async def model_infer(self, body: bytes, context: Any) -> bytes | None:
        record = Record(face="grpc", began_s=time.perf_counter())
        try:
            encoded = await self._infer(body, context, record)
        except asyncio.CancelledError:
            record.status = 499
            raise
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            record.status, reason = status_of(error)
            record.reason = type(error).__name__
        else:
            record.status = 200
            return encoded
        finally:
            self._face.seen.record(record)
        await _refuse(context, record.status, reason)
        return None

    async def _infer(self, body: bytes, context: Any, record: Record) -> bytes:
        face = self._face
        self._check(context)
        face.service.check_room()
        request = await off_loop(len(body), _parse, body)
        version = request.model_version or None
        model = find(face.service, request.model_name, version)
        question = await off_loop(len(body), decode_message, request, model, face.limits)
        record.asked(len(body), question)
        given_s = [given for given in (question.timeout_s, context.time_remaining()) if given is not None]
        timeout_s = min(given_s, default=face.limits.timeout_s)
        answer = await ask(face, question, None if version is None else model.version, timeout_s)
        record.answered(answer.version)
        encoded = await off_loop(size_of(answer), encoded_by, encode_message, question, model, answer)
        record.encoded()
        return encoded

    def _check(self, context: Any) -> None:
        if self._face.key is not None:
            came = context.invocation_metadata() or ()
            self._face.key.check([(name.encode(), v if isinstance(v, bytes) else v.encode()) for name, v in came])


def _parse(body: bytes) -> Any:
    try:
        return message("ModelInferRequest").FromString(body)
    except DecodeError as error:
        raise ConfigError(f"the message must be a ModelInferRequest: {error}") from error
