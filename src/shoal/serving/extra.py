"""The packages of the extra ``shoal[serve]``, which may not be installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shoal.errors import ConfigError

_PACKAGES = ("starlette", "uvicorn", "uvloop", "httpx", "prometheus_client")


@contextlib.contextmanager
def serve_extra() -> Iterator[None]:
    """Import from the extra inside this. ``ConfigError`` if a package of it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise ConfigError(f"serving needs the package {error.name}: pip install 'shoal[serve]'") from error
