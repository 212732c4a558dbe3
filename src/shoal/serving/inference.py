"""One inference request over HTTP: the path that every prediction takes, so it does no more than it must.

Plain ASGI, without a framework's objects. A request that would be refused anyway is refused before its body is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import msgspec

from shoal.errors import ConfigError
from shoal.serving.access import Denied, Key
from shoal.serving.answering import Answer, NotReady, Served, Service, Unknown, find
from shoal.serving.batching import Expired, Overloaded
from shoal.serving.codec import LENGTH_HEADER, Question, decode_request, encode_response
from shoal.serving.columns import decode_columns, encode_columns
from shoal.serving.limits import Limits, TooLarge, TooSlow
from shoal.serving.seen import Record, Seen

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

_log = logging.getLogger(__name__)

ON_GONE = "shoal.on_gone"
"""An extension of ASGI: to be given what is to be called if the client of a request hangs up before it is answered."""
_NOTHING: Mapping[str, Any] = {}
LARGE_BYTES = 1 << 18
"""A body of more is read and written in a thread."""
_PATIENT_S = 0.02
"""Who has not been answered for this long is watched, to see whether he hangs up."""
_LENGTH_HEADER = LENGTH_HEADER.lower().encode()
_JSON = (b"content-type", b"application/json")
_BYTES = (b"content-type", b"application/octet-stream")

Headers = list[tuple[bytes, bytes]]
P = ParamSpec("P")
T = TypeVar("T")


class Gone(Exception):
    """Whoever asked has hung up."""


class Codec(Protocol):
    """How a question comes in a body, and its answer goes."""

    def decode(self, body: bytes, length: str | None, model: Served, limits: Limits) -> Question:
        """``ConfigError`` for everything that the model must not see."""
        ...

    def encode(self, question: Question, model: Served, answer: Answer) -> tuple[bytes, int | None]:
        """The body, and how many bytes of it are JSON if tensors' bytes follow."""
        ...


class OpenInference:
    """The Open Inference Protocol's."""

    def decode(self, body: bytes, length: str | None, model: Served, limits: Limits) -> Question:
        return decode_request(body, length, model.inputs, model.outputs, limits)

    def encode(self, question: Question, model: Served, answer: Answer) -> tuple[bytes, int | None]:
        return encode_response(question, model.name, answer.version, answer.outputs)


class PlainColumns:
    """The plain one, of ``/predict``."""

    def decode(self, body: bytes, length: str | None, model: Served, limits: Limits) -> Question:
        if length is not None:
            raise ConfigError(f"plain columns come in JSON alone, without {LENGTH_HEADER}")
        return decode_columns(body, model.inputs, model.outputs, limits)

    def encode(self, question: Question, model: Served, answer: Answer) -> tuple[bytes, int | None]:
        return encode_columns(question, answer.outputs), None


@dataclass(frozen=True, kw_only=True)
class Face:
    """What the faces of a server have in common. ``key``: that each request must carry, if there is one."""

    service: Service
    limits: Limits = field(default_factory=Limits)
    key: Key | None = None
    seen: Seen = field(default_factory=Seen)


class Asked(Protocol):
    """A request that has come whole, and can be answered without a task of its own."""

    @property
    def headers(self) -> Headers: ...

    @property
    def body(self) -> bytes: ...

    def on_gone(self, tell: Callable[[], object]) -> None:
        """To be told if whoever asks hangs up before he is answered."""
        ...

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """All of it, at once."""
        ...


class Inference:
    """Answers ``POST`` of a question to one model."""

    def __init__(self, face: Face, codec: Codec) -> None:
        self._face = face
        self._codec = codec
        self._large: set[asyncio.Task[None]] = set()

    async def answer(self, scope: Scope, receive: Receive, send: Send, name: str | None, version: str | None) -> None:
        """``name`` None: the model that is served."""
        record = Record(face="http", began_s=time.perf_counter())
        try:
            status, headers, body = await self._answer(scope, receive, record, name, version)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            status, headers, body = self._refused(record, error)
        record.status = status
        try:
            await send({"type": "http.response.start", "status": status, "headers": [*headers, content_length(body)]})
            await send({"type": "http.response.body", "body": body})
        finally:
            self._face.seen.record(record)  # nobody waits for that

    async def _answer(
        self, scope: Scope, receive: Receive, record: Record, name: str | None, version: str | None
    ) -> tuple[int, Headers, bytes]:
        face, headers = self._face, scope["headers"]
        model = self._admitted(headers, record, name, version)
        body = await _read(receive, face.limits)
        length = _header(headers, _LENGTH_HEADER)
        question = await off_loop(len(body), self._codec.decode, body, length, model, face.limits)
        record.asked(len(body), question)
        answer = await self._ask(scope, receive, question, None if version is None else model.version)
        record.answered(answer.version)
        encoded = await off_loop(size_of(answer), encoded_by, self._codec.encode, question, model, answer)
        record.encoded()
        return _told(*encoded)

    def _admitted(self, headers: Headers, record: Record, name: str | None, version: str | None) -> Served:
        """The model that is asked, by whom it may be."""
        face = self._face
        if face.key is not None:
            face.key.check(headers)
        model = find(face.service, name, version)
        face.service.check_room()
        if face.seen.traces is not None:
            record.traceparent = _header(headers, b"traceparent") or ""
        return model

    def _refused(self, record: Record, error: Exception) -> tuple[int, Headers, bytes]:
        if isinstance(error, Gone):
            return 499, [_JSON], b""
        record.reason = type(error).__name__
        return refusal(error)

    async def _ask(self, scope: Scope, receive: Receive, question: Question, version: int | None) -> Answer:
        """``Gone`` if whoever asks hangs up meanwhile; it is not computed any more then."""
        task = asyncio.current_task()
        assert task is not None
        watch = _Watch(scope, receive, task)
        try:
            return await ask(self._face, question, version)
        except asyncio.CancelledError:
            if not watch.has_gone:
                raise
            task.uncancel()
            raise Gone from None
        finally:
            watch.end()

    def begin(self, asked: Asked, name: str | None, version: str | None) -> None:
        """The same for a request that has come whole and is not large: it is answered when the model has. Neither a
        task nor a coroutine is made for it, which would cost as much as all else."""
        record = Record(face="http", began_s=time.perf_counter())
        try:
            model = self._admitted(asked.headers, record, name, version)
            body, length = asked.body, _header(asked.headers, _LENGTH_HEADER)
            self._face.limits.check_bytes(len(body))
            question = self._codec.decode(body, length, model, self._face.limits)
            record.asked(len(body), question)
            future = asked_of(self._face, question, None if version is None else model.version)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            self._tell(asked, record, *self._refused(record, error))
            return
        asked.on_gone(future.cancel)
        future.add_done_callback(partial(self._finish, asked, record, question, model))

    def _finish(
        self, asked: Asked, record: Record, question: Question, model: Served, future: asyncio.Future[Answer]
    ) -> None:
        try:
            answer = answer_of(future)
            record.answered(answer.version)
            if size_of(answer) > LARGE_BYTES:
                task = asyncio.create_task(self._finish_large(asked, record, question, model, answer))
                self._large.add(task)
                task.add_done_callback(self._large.discard)
                return
            encoded = encoded_by(self._codec.encode, question, model, answer)
        except asyncio.CancelledError:
            told = self._refused(record, Gone())
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            told = self._refused(record, error)
        else:
            record.encoded()
            told = _told(*encoded)
        self._tell(asked, record, *told)

    async def _finish_large(
        self, asked: Asked, record: Record, question: Question, model: Served, answer: Answer
    ) -> None:
        try:
            told = _told(*await asyncio.to_thread(encoded_by, self._codec.encode, question, model, answer))
            record.encoded()
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            told = self._refused(record, error)
        self._tell(asked, record, *told)

    def _tell(self, asked: Asked, record: Record, status: int, headers: Headers, body: bytes) -> None:
        record.status = status
        try:
            asked.answer(status, headers, body)
        finally:
            self._face.seen.record(record)  # nobody waits for that


def _told(encoded: bytes, json_bytes: int | None) -> tuple[int, Headers, bytes]:
    if json_bytes is None:
        return 200, [_JSON], encoded
    return 200, [_BYTES, (_LENGTH_HEADER, b"%d" % json_bytes)], encoded


def _header(headers: Headers, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in headers if key == name), None)


class ModelFailed(Exception):
    """Told to whoever asked, as 500."""


def _failed(error: Exception) -> ModelFailed:
    _log.error("the model failed on a request", exc_info=error)
    return ModelFailed(f"the model failed on this request: {type(error).__name__}: {error}")


def asked_of(
    face: Face, question: Question, version: int | None, timeout_s: float | None = None
) -> asyncio.Future[Answer]:
    """Ask the service, which has ``timeout_s``; or as long as the question says, else the limit."""
    if timeout_s is None:
        timeout_s = question.timeout_s or face.limits.timeout_s
    return face.service.ask(question.inputs, timeout_s, version)


def answer_of(asked: asyncio.Future[Answer]) -> Answer:
    """The service's, once it is there; ``ModelFailed`` for what is the model's own failure."""
    try:
        return asked.result()
    except (ConfigError, Overloaded, Expired, NotReady):  # told as what they are
        raise
    except Exception as error:
        raise _failed(error) from error


async def ask(face: Face, question: Question, version: int | None, timeout_s: float | None = None) -> Answer:
    """As ``asked_of`` and ``answer_of``. Cancelled, it is not computed any more."""
    asked = asked_of(face, question, version, timeout_s)
    with contextlib.suppress(Exception):
        await asked
    return answer_of(asked)


def encoded_by(encode: Callable[[Question, Served, Answer], T], question: Question, model: Served, answer: Answer) -> T:
    """An answer in the form that ``encode`` makes; ``ModelFailed`` if it cannot, since the model computed it."""
    try:
        return encode(question, model, answer)
    except Exception as error:
        raise _failed(error) from error


def size_of(answer: Answer) -> int:
    """Bytes of its tensors."""
    return sum(array.nbytes for array in answer.outputs.values())


class _Watch:
    """Cancels the task that answers a client that hangs up: told by a server of ours, or seen by looking."""

    def __init__(self, scope: Scope, receive: Receive, task: asyncio.Task[Any]) -> None:
        self._receive = receive
        self._task = task
        self._watching: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = self.has_gone = False
        on_gone = scope.get("extensions", _NOTHING).get(ON_GONE)
        if on_gone is not None:
            on_gone(self._give_up)
        else:
            self._timer = asyncio.get_running_loop().call_later(_PATIENT_S, self._begin)

    def _give_up(self) -> None:
        if not self._is_over:
            self.has_gone = True
            self._task.cancel()

    def _begin(self) -> None:
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._give_up()

    def end(self) -> None:
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._watching is not None:
            self._watching.cancel()


async def _read(receive: Receive, limits: Limits) -> bytes:
    try:
        async with asyncio.timeout(limits.timeout_s):
            first = await receive()
            if first["type"] == "http.request" and not first.get("more_body", False):
                body: bytes = first.get("body", b"")
                limits.check_bytes(len(body))
                return body
            return await _read_on(receive, first, limits)
    except TimeoutError:
        raise TooSlow(f"the body did not come within {limits.timeout_s} s") from None


async def _read_on(receive: Receive, message: Message, limits: Limits) -> bytes:
    """What is too much is read on, and forgotten: a client that writes hears no answer before it is done."""
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        if message["type"] == "http.disconnect":
            raise Gone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limits.max_body_bytes:
            chunks.append(chunk)
        else:
            chunks.clear()
        more = message.get("more_body", False)
        message = await receive() if more else message
    limits.check_bytes(size)
    return b"".join(chunks)


async def off_loop(num_bytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of so many bytes: in a thread if they are many, so that others are answered meanwhile."""
    if num_bytes <= LARGE_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def content_length(body: bytes) -> tuple[bytes, bytes]:
    """The header that says how long a body is."""
    return (b"content-length", str(len(body)).encode())


def refusal(error: Exception) -> tuple[int, Headers, bytes]:
    """How an error is told over HTTP: ``{"error": reason}`` and the status that fits."""
    status, message = status_of(error)
    headers: Headers = [_JSON]
    match error:
        case Denied():
            headers.append((b"www-authenticate", b"Bearer"))
        case TooSlow():
            headers.append((b"connection", b"close"))
        case Overloaded():
            headers.append((b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
        case NotReady():
            headers.append((b"retry-after", b"1"))
    return status, headers, msgspec.json.encode({"error": message})


_STATUSES: Sequence[tuple[type[Exception], int]] = (
    (Denied, 401),
    (Unknown, 404),
    (TooLarge, 413),
    (TooSlow, 408),
    (ConfigError, 400),
    (Overloaded, 429),
    (NotReady, 503),
    (Expired, 504),
    (ModelFailed, 500),
)
"""The first that fits."""


def status_of(error: Exception) -> tuple[int, str]:
    """The status that tells of an error, which is HTTP's, and the reason."""
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status, getattr(error, "message", str(error))
    _log.error("an answer could not be made", exc_info=error)
    return 500, f"the server failed on this request: {type(error).__name__}: {error}"
