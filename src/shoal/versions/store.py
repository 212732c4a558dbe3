"""Where a run keeps what must outlive it: named blobs under a URL, written whole or not at all. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from shoal.errors import ConfigError, ShoalError, StoreFault

Bytes = bytes | bytearray | memoryview
_T = TypeVar("_T")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)


class Exists(StoreFault):
    """The name is taken."""


class Absent(StoreFault):
    """Nothing has the name."""


class Files(Protocol):
    """What a store needs of a file system. Errors are ``OSError``; a taken name ``FileExistsError``."""

    def create(self, name: str, data: Bytes) -> None:
        """Write ``name`` if and only if it does not exist, also against other processes and hosts."""
        ...

    def put(self, name: str, *parts: Bytes) -> None:
        """Write or replace ``name`` by ``parts`` one after another. A reader sees the old or the new, never less."""
        ...

    def read(self, name: str) -> Bytes: ...

    def list(self, folder: str) -> list[str]:
        """Names in ``folder``, in order; none if there is no such folder."""
        ...

    def delete(self, name: str) -> None:
        """Remove a blob, or a folder with all that it holds; what is not there is no error."""
        ...


class Store:
    """Named blobs under ``url``: a local folder, ``s3://bucket/prefix`` (needs ``shoal[s3]``) or ``memory://name``.

    Names are relative, such as ``versions/0000000100/manifest.json``. Every write is atomic: a process killed at any
    instruction leaves the old blob or the new one. On a local disk a write has reached it when the call returns.
    ``create`` has exactly one winner among all processes and hosts, which is what keeps one history; a file system
    that cannot promise it is refused with ``ConfigError``.

    Calls may come from any thread. They raise ``StoreFault`` with the system's reason, ``Exists`` or ``Absent``.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._files = _files_at(url)

    def create(self, name: str, data: Bytes) -> None:
        """Write ``name`` if nobody has; else ``Exists``."""
        self._do("create", name, lambda: self._files.create(name, data))

    def put(self, name: str, *parts: Bytes) -> None:
        """Write or replace ``name`` by ``parts``, one after another; they are not copied into one."""
        self._do("write", name, lambda: self._files.put(name, *parts))

    def read(self, name: str) -> Bytes:
        """The whole blob; ``Absent`` if there is none."""
        return self._do("read", name, lambda: self._files.read(name))

    def list(self, folder: str) -> list[str]:
        """Names of what ``folder`` holds, in order; none if it does not exist."""
        return self._do("list", folder, lambda: self._files.list(folder))

    def delete(self, name: str) -> None:
        """Remove a blob, or a folder with all that it holds; what is not there is no error."""
        self._do("delete", name, lambda: self._files.delete(name))

    def _do(self, verb: str, name: str, action: Callable[[], _T]) -> _T:
        if not all(_PART.fullmatch(part) for part in name.split("/")):
            raise ConfigError(
                f"{name!r} is no name in a store; use letters, digits, '.', '_', '-' and '/' between them"
            )
        where = f"{self.url.rstrip('/')}/{name}"
        try:
            return action()
        except ShoalError:
            raise
        except FileExistsError as error:
            raise Exists(f"cannot {verb} {where}: the name is taken") from error
        except FileNotFoundError as error:
            raise Absent(f"cannot {verb} {where}: there is nothing of that name") from error
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            raise StoreFault(f"{reason[0].lower()}{reason[1:]}: cannot {verb} {where}") from error


def _files_at(url: str) -> Files:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme in ("file", "local"):
        from shoal.versions.local import LocalFiles

        return LocalFiles(Path(rest if separator else url).absolute())
    if scheme in ("s3", "s3a"):
        from shoal.versions.remote import S3Files

        return S3Files(rest)
    if scheme == "memory":
        from shoal.versions.remote import MemoryFiles

        return MemoryFiles(rest)
    raise ConfigError(
        f"a run's store at {url} cannot keep one history: {scheme}:// offers no create-if-absent that holds between"
        " hosts; use a local or shared folder, or s3://bucket/prefix"
    )
