"""A server in this process: in the main thread until a signal, or in a thread of its own for a while."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from shoal.errors import ConfigError
from shoal.serving.answering import Alone
from shoal.serving.batching import Batching
from shoal.serving.extra import serve_extra
from shoal.serving.limits import Limits
from shoal.serving.predictor import Predictor

if TYPE_CHECKING:
    import uvicorn

_SHUTDOWN_S = 10
_BACKLOG = 2048


@dataclass(frozen=True)
class Tls:
    """Files in PEM: a certificate with its chain, and its private key."""

    cert: Path
    key: Path

    def __post_init__(self) -> None:
        for path in (self.cert, self.key):
            if not path.is_file():
                raise ConfigError(f"{path} is no file: TLS needs a certificate and its key, in PEM")


def serve(
    predictor: Predictor,
    host: str = "127.0.0.1",
    port: int = 8000,
    announce: Callable[[str], object] | None = None,
    limits: Limits | None = None,
    batching: Batching | None = None,
) -> None:
    """Answer from this process until SIGTERM or SIGINT; then finish the requests at hand and end by that signal. Main
    thread only. For a service that survives its model's crashes, and takes new versions, see ``shoal serve``.

    Listens on the loopback alone unless told otherwise: there is neither authentication nor encryption. ``port`` 0
    takes a free one. ``announce`` is called with the model's address once it accepts connections. ``batching`` says how
    many requests wait and go together. ``ConfigError`` if the address cannot be had.
    """
    alone = Alone(predictor, batching)
    server = _alone_server(alone, limits)
    try:
        with listen(host, port) as listener:
            if announce:
                announce(model_url(url_of(listener), predictor.name))
            server.run(sockets=[listener])
    finally:
        alone.close()


class Server:
    """Serve in a thread while the context lasts. ``port`` 0 takes a free one; ``url`` tells which, at once."""

    def __init__(
        self, predictor: Predictor, host: str = "127.0.0.1", port: int = 0, limits: Limits | None = None,
        batching: Batching | None = None,
    ) -> None:  # fmt: skip
        self._alone = Alone(predictor, batching)
        self._server = _alone_server(self._alone, limits)
        self._listener = listen(host, port)
        self.url = url_of(self._listener)
        self.model_url = model_url(self.url, predictor.name)
        # Connections that come before the thread is ready wait in the listener's backlog.
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), name="serve", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
        self._alone.close()


def url_of(listener: socket.socket, tls: Tls | None = None) -> str:
    """Where a listener is."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def model_url(url: str, name: str) -> str:
    """Where a server at ``url`` has the model of this name."""
    return f"{url}/v2/models/{quote(name, safe='')}"


def _alone_server(alone: Alone, limits: Limits | None) -> uvicorn.Server:
    with serve_extra():
        from shoal.serving.app import App
        from shoal.serving.inference import Face
    return http_server(App(Face(service=alone, limits=limits or Limits())))


def http_server(app: Any, tls: Tls | None = None, *, heeds_signals: bool = True) -> uvicorn.Server:
    """For an ASGI app. ``heeds_signals``: it ends by SIGTERM and SIGINT, by itself. ``ConfigError`` if the TLS files
    are none."""
    with serve_extra():
        import uvicorn
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        ssl_certfile=tls.cert if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"{tls and tls.cert} and its key cannot be used for TLS: {error}") from error
    server = uvicorn.Server(config)
    if not heeds_signals:
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    return server


def listen(host: str, port: int) -> socket.socket:
    """``ConfigError`` if the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot serve on {host}:{port}: {error}; choose another host or port") from error
    # asyncio does this only where it made the socket; without it, an answer waits 40 ms for a delayed ack.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
