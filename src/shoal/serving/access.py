"""Who may ask: a key that a request must carry, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import ConfigError

_FEWEST_CHARS = 16


class Denied(ConfigError):
    """A request carries no key, or a wrong one."""


class Key:
    """Of which only a hash is kept. ``ConfigError`` for one that could be guessed."""

    def __init__(self, secret: str) -> None:
        if len(secret) < _FEWEST_CHARS or not secret.isascii():
            raise ConfigError(f"a key must have {_FEWEST_CHARS} ASCII characters at least, not {len(secret)}")
        self._digest = hashlib.sha256(secret.encode()).digest()

    @classmethod
    def read(cls, path: Path) -> Key:
        """From a file with one line. ``ConfigError`` if it cannot be read, or if others than its owner may."""
        try:
            mode = path.stat().st_mode
            secret = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the key file {path} cannot be read: {error}") from error
        if mode & 0o077:
            raise ConfigError(f"the key file {path} can be read by others: chmod 600 {path}")
        return cls(secret)

    @classmethod
    def found(cls, path: Path | None, variable: str) -> Key | None:
        """The file's, else the environment's, else none."""
        if path is not None:
            return cls.read(path)
        return cls(os.environ[variable]) if os.environ.get(variable) else None

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """``Denied`` unless ``Authorization: Bearer KEY`` or ``X-API-Key: KEY`` is among these."""
        came = b""
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                came = value[7:].strip()
            elif name == b"x-api-key":
                came = value.strip()
        if not hmac.compare_digest(hashlib.sha256(came).digest(), self._digest):
            raise Denied("a key is needed: send it as Authorization: Bearer KEY" if not came else "the key is wrong")
