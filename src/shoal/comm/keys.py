"""The key of a job: who has it may take part, and what they say to each other over a network is encrypted.

One CURVE key pair a job. Listeners prove themselves with its secret half, callers too, and a listener admits only
callers that hold the same pair. It is handed to workers in a file or inside the launcher's own channel, never in an
argument, a log or a URL.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from shoal.errors import ConfigError

if TYPE_CHECKING:
    import ssl


@dataclass(frozen=True)
class JobKey:
    """A CURVE key pair in Z85 text. Its secret half never shows in a ``repr``."""

    public: str
    secret: str = field(repr=False)

    @staticmethod
    def make() -> JobKey:
        public, secret = zmq.curve_keypair()
        return JobKey(public.decode(), secret.decode())

    def write(self, path: Path) -> None:
        """Write to a new file that only its owner can read."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(self))

    @staticmethod
    def read(path: Path) -> JobKey:
        try:
            return msgspec.json.decode(path.read_bytes(), type=JobKey)
        except FileNotFoundError:
            raise ConfigError(f"the job's key is needed and {path} does not exist; copy it from RUN/key") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"the job's key in {path} cannot be read: {error}") from error

    def listen(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket that is about to bind encrypted. ``admit`` must be running in its context."""
        socket.curve_server = True
        socket.curve_secretkey = self.secret.encode()
        socket.zap_domain = b"shoal"

    def call(self, socket: zmq.Socket[bytes]) -> None:
        """Make a socket that is about to connect encrypted."""
        socket.curve_serverkey = self.public.encode()
        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self.secret.encode()

    def tls(self, *, serves: bool, near: bool = False) -> ssl.SSLContext:
        """TLS 1.3 among those who hold this key: each side shows that it does, and neither takes another's word.
        ``near``: what follows may be in the clear (``comm.sealing``)."""
        from shoal.comm.tls import context_for

        return context_for(self.secret, serves=serves, near=near)
