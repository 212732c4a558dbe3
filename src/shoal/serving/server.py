"""A server in this process: in the main thread until a signal, or in a thread of its own for a while."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from shoal.errors import ConfigError
from shoal.serving.answering import Alone
from shoal.serving.batching import Batching
from shoal.serving.extra import serve_extra
from shoal.serving.limits import BACKLOG, Limits
from shoal.serving.predictor import Predictor

if TYPE_CHECKING:
    import ssl

    from shoal.serving.http1 import HttpServer


@dataclass(frozen=True)
class Tls:
    """Files in PEM: a certificate with its chain, and its private key."""

    cert: Path
    key: Path

    def __post_init__(self) -> None:
        for path in (self.cert, self.key):
            if not path.is_file():
                raise ConfigError(f"{path} is no file: TLS needs a certificate and its key, in PEM")

    def context(self) -> ssl.SSLContext:
        """For a server. ``ConfigError`` if the files are not what they must be."""
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"{self.cert} and its key cannot be used for TLS: {error}") from error
        return context


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
            with serve_extra():
                import uvloop
            number = uvloop.run(_until_a_signal(server, listener))
    finally:
        alone.close()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


async def _until_a_signal(server: HttpServer, listener: socket.socket) -> int:
    with signals() as ended:
        serving = asyncio.create_task(server.serve(listener))
        waited: set[asyncio.Future[Any]] = {ended, serving}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        server.end()
        await serving
        return ended.result()


@contextlib.contextmanager
def signals() -> Iterator[asyncio.Future[int]]:
    """Done with the number of the first signal to end that comes. A second one ends at once."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(number: int) -> None:
        if ended.done():
            os._exit(128 + number)
        ended.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    try:
        yield ended
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


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
        self._thread = threading.Thread(target=self._serve, name="serve", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    def __enter__(self) -> Self:
        with serve_extra():
            import uvloop
        self._loop = uvloop.new_event_loop()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._server.end)
        self._thread.join()
        self._listener.close()
        self._alone.close()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._server.serve(self._listener))


def url_of(listener: socket.socket, tls: Tls | None = None) -> str:
    """Where a listener is."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def model_url(url: str, name: str) -> str:
    """Where a server at ``url`` has the model of this name."""
    return f"{url}/v2/models/{quote(name, safe='')}"


def _alone_server(alone: Alone, limits: Limits | None) -> HttpServer:
    with serve_extra():
        from shoal.serving.app import App
        from shoal.serving.http1 import HttpServer
        from shoal.serving.inference import Face
    app = App(Face(service=alone, limits=limits or Limits()))
    return HttpServer(app, quick=app)


def listen(host: str, port: int) -> socket.socket:
    """``ConfigError`` if the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot serve on {host}:{port}: {error}; choose another host or port") from error
    # asyncio does this only where it made the socket; without it, an answer waits 40 ms for a delayed ack.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
