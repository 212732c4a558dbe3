"""The packages of the extras ``shoal[serve]``, ``[grpc]`` and ``[flask]``, which may not be installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shoal.errors import ConfigError

_EXTRAS = {
    **dict.fromkeys(("starlette", "httptools", "uvloop", "httpx", "prometheus_client"), "serve"),
    **dict.fromkeys(("grpc", "google"), "grpc"),
    "flask": "flask",
    "opentelemetry": "traces",
}
_PACKAGES = {"grpc": "grpcio", "google": "protobuf"}


@contextlib.contextmanager
def serve_extra() -> Iterator[None]:
    """Import from an extra inside this. ``ConfigError`` if a package of it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRAS:
            raise
        package, extra = _PACKAGES.get(name, name), _EXTRAS[name]
        raise ConfigError(f"serving needs the package {package}: pip install 'shoal[{extra}]'") from error


@contextlib.contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Import from the extra ``shoal[NAME]`` inside this. ``ConfigError`` if a package of it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{purpose} needs the package {error.name}: pip install 'shoal[{name}]'") from error
