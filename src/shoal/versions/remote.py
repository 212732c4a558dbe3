"""A store behind a URL: S3 and what speaks its protocol; memory, for tests."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from shoal.errors import ConfigError
from shoal.versions.store import Bytes

_PIECE_BYTES = 16 << 20
_CONFLICT_TRIES = 5
_PATIENCE = {"retries": {"total_max_attempts": 2}}  # of the client; s3fs tries each call five times as it is


class S3Files:
    """Blobs are objects. Credentials, region and endpoint are those of the environment, such as ``AWS_ENDPOINT_URL``.

    ``create`` is a put with ``If-None-Match: *``. The first one also shows that the server obeys it: a second put on
    the same key must be refused. A large put is a multipart upload, complete or invisible; what a killed process
    leaves of one is not listed, and a bucket's life-cycle rule can remove it.
    """

    def __init__(self, root: str) -> None:
        try:
            from s3fs import S3FileSystem
        except ImportError as error:
            raise ConfigError(
                f"a store at s3://{root} needs s3fs, which is missing; pip install 'shoal[s3]'"
            ) from error
        self._root = root.strip("/")
        self._fs: Any = S3FileSystem(use_listings_cache=False, skip_instance_cache=True, config_kwargs=_PATIENCE)
        self._obeyed = False

    def create(self, name: str, data: Bytes) -> None:
        writer = uuid.uuid4().hex
        # The client repeats a put whose answer was lost, and is then refused for the object that it has made itself.
        if not self._put_if_absent(name, bytes(data), writer) and self._writer(name) != writer:
            raise FileExistsError(name)
        if not self._obeyed and self._put_if_absent(name, bytes(data), writer):
            raise ConfigError(
                f"the server behind s3://{self._root} ignores If-None-Match, so it cannot keep one history;"
                " use one that knows conditional writes, or a shared folder"
            )
        self._obeyed = True

    def _put_if_absent(self, name: str, data: bytes, writer: str) -> bool:
        bucket, key, _ = self._fs.split_path(f"{self._root}/{name}")
        request = {"Bucket": bucket, "Key": key, "Body": data, "Metadata": {"writer": writer}, "IfNoneMatch": "*"}
        for tries_left in reversed(range(_CONFLICT_TRIES)):
            try:
                with _as_os_errors():
                    self._fs.call_s3("put_object", **request)
                return True
            except OSError as error:
                if _code(error) in ("PreconditionFailed", "412"):
                    return False
                if _code(error) not in ("ConditionalRequestConflict", "409") or not tries_left:
                    raise
        raise AssertionError("unreachable")

    def _writer(self, name: str) -> str:
        bucket, key, _ = self._fs.split_path(f"{self._root}/{name}")
        with _as_os_errors():
            head = self._fs.call_s3("head_object", Bucket=bucket, Key=key)
        return str(head.get("Metadata", {}).get("writer", ""))

    def put(self, name: str, *parts: Bytes) -> None:
        with _as_os_errors():
            file = self._fs.open(f"{self._root}/{name}", "wb")
            try:
                for part in parts:
                    view = memoryview(part).cast("B")
                    for start in range(0, len(view), _PIECE_BYTES):
                        file.write(view[start : start + _PIECE_BYTES])
            except BaseException:
                file.discard()
                raise
            file.close()

    def read(self, name: str) -> Bytes:
        with _as_os_errors():
            data: bytes = self._fs.cat_file(f"{self._root}/{name}")
        return data

    def list(self, folder: str) -> list[str]:
        with _as_os_errors():
            return _names(self._fs, f"{self._root}/{folder}")

    def delete(self, name: str) -> None:
        with _as_os_errors():
            _remove(self._fs, f"{self._root}/{name}")


class MemoryFiles:
    """Blobs in this process's memory, under one lock: for tests."""

    _lock = threading.RLock()

    def __init__(self, root: str) -> None:
        try:
            from fsspec.implementations.memory import MemoryFileSystem
        except ImportError as error:
            raise ConfigError("a store in memory needs fsspec, which is missing; pip install 'shoal[s3]'") from error
        self._root = f"/{root.strip('/')}"
        self._fs: Any = MemoryFileSystem()

    def create(self, name: str, data: Bytes) -> None:
        with self._lock:
            if self._fs.exists(f"{self._root}/{name}"):
                raise FileExistsError(name)
            self.put(name, data)

    def put(self, name: str, *parts: Bytes) -> None:
        with self._lock:
            self._fs.pipe_file(f"{self._root}/{name}", b"".join(parts))

    def read(self, name: str) -> Bytes:
        with self._lock:
            data: bytes = self._fs.cat_file(f"{self._root}/{name}")
        return data

    def list(self, folder: str) -> list[str]:
        with self._lock:
            return _names(self._fs, f"{self._root}/{folder}")

    def delete(self, name: str) -> None:
        with self._lock:
            _remove(self._fs, f"{self._root}/{name}")


def _names(fs: Any, folder: str) -> list[str]:
    try:
        paths = fs.ls(folder, detail=False)
    except FileNotFoundError:
        return []
    return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)


def _remove(fs: Any, path: str) -> None:
    with suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """botocore's own errors, such as no credentials or no such host, as ``OSError``; s3fs makes it of the server's."""
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error


def _code(error: OSError) -> str:
    """What the server called it."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
