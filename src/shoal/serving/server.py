"""A server in this process: in the main thread until a signal, or in a thread of its own for a while."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

from shoal.errors import ConfigError
from shoal.serving.batching import Batching
from shoal.serving.extra import serve_extra
from shoal.serving.predictor import Predictor

if TYPE_CHECKING:
    import uvicorn


def serve(
    predictor: Predictor,
    host: str = "127.0.0.1",
    port: int = 8000,
    announce: Callable[[str], object] | None = None,
    max_body_bytes: int = 64 * 2**20,
    batching: Batching | None = None,
) -> None:
    """Answer until SIGTERM or SIGINT; then finish the requests at hand and end by that signal. Main thread only.

    Listens on the loopback alone unless told otherwise: there is neither authentication nor encryption. ``port`` 0
    takes a free one. ``announce`` is called with the model's address once it accepts connections. A request's body may
    have ``max_body_bytes``; ``batching`` says how many wait and go together. ``ConfigError`` if the address cannot be
    had.
    """
    server = _make(predictor, max_body_bytes, batching)
    with _listen(host, port) as listener:
        if announce:
            announce(_model_url(_url(listener), predictor))
        server.run(sockets=[listener])


class Server:
    """Serve in a thread while the context lasts. ``port`` 0 takes a free one; ``url`` tells which, at once."""

    def __init__(
        self, predictor: Predictor, host: str = "127.0.0.1", port: int = 0, max_body_bytes: int = 64 * 2**20,
        batching: Batching | None = None,
    ) -> None:  # fmt: skip
        self._server = _make(predictor, max_body_bytes, batching)
        self._listener = _listen(host, port)
        self.url = _url(self._listener)
        self.model_url = _model_url(self.url, predictor)
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


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _model_url(url: str, predictor: Predictor) -> str:
    return f"{url}/v2/models/{quote(predictor.name, safe='')}"


def _make(predictor: Predictor, max_body_bytes: int, batching: Batching | None) -> uvicorn.Server:
    with serve_extra():
        import uvicorn

        from shoal.serving.app import make_app
    config = uvicorn.Config(
        make_app(predictor, max_body_bytes, batching),
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot serve on {host}:{port}: {error}; choose another host or port") from error
    # asyncio does this only where it made the socket; without it, an answer waits 40 ms for a delayed ack.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
