"""A server in this process: in the main thread until a signal, or in a thread of its own for a while."""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

from shoal.errors import ConfigError
from shoal.serving.extra import serve_extra
from shoal.serving.predictor import Predictor

if TYPE_CHECKING:
    import uvicorn


def serve(predictor: Predictor, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer until SIGTERM or SIGINT; then finish the requests at hand and end by that signal. Main thread only.

    Listens on the loopback alone unless told otherwise: there is neither authentication nor encryption. ``ConfigError``
    if the address cannot be had.
    """
    server = _make(predictor)
    with _listen(host, port) as listener:
        server.run(sockets=[listener])


class Server:
    """Serve in a thread while the context lasts. ``port`` 0 takes a free one; ``url`` tells which, at once."""

    def __init__(self, predictor: Predictor, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = _make(predictor)
        self._listener = _listen(host, port)
        address = f"[{host}]" if ":" in host else host
        self.url = f"http://{address}:{self._listener.getsockname()[1]}"
        self.model_url = f"{self.url}/v2/models/{predictor.name}"
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


def _make(predictor: Predictor) -> uvicorn.Server:
    with serve_extra():
        import uvicorn

        from shoal.serving.app import make_app
    config = uvicorn.Config(
        make_app(predictor),
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
    # asyncio does this only where it made the socket; without it, every answer waits 40 ms for the client's delayed ack.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
