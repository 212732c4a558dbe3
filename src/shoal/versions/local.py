"""A store in a local folder, or one shared by hosts (NFS)."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.errors import ConfigError
from shoal.versions.store import Bytes

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_DRAFT = "[0-9a-f]" * 32


class LocalFiles:
    """Blobs are files: written beside their place, synced, linked or renamed into it, and the folder synced."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, name: str, data: Bytes) -> None:
        path = self._root / name
        with _written(path, (data,)) as draft:
            try:
                os.link(draft, path)
            except (FileExistsError, FileNotFoundError) as error:
                if not _is_linked(draft):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise ConfigError(
                    f"{self._root} cannot keep one history: its file system makes no hard links; choose another store"
                ) from error
        _settle(path)

    def put(self, name: str, *parts: Bytes) -> None:
        path = self._root / name
        with _written(path, parts) as draft:
            try:
                os.replace(draft, path)
            except FileNotFoundError as error:
                raise OSError(errno.EBUSY, "another process has written it meanwhile") from error
        _settle(path)

    def read(self, name: str) -> Bytes:
        return (self._root / name).read_bytes()

    def list(self, folder: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self._root / folder) if not name.startswith("."))
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        path = self._root / name
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            return
        _sync(path.parent)


@contextmanager
def _written(path: Path, parts: tuple[Bytes, ...]) -> Iterator[Path]:
    """A draft beside ``path`` that holds ``parts``, all of it on the disk; removed in the end."""
    _make(path.parent)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "xb", buffering=0) as file:
            for part in parts:
                _write(file.fileno(), memoryview(part).cast("B"))
            os.fsync(file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _is_linked(draft: Path) -> bool:
    """Whether a link to it was made all the same: NFS may repeat one, and report the repetition. A draft that is gone
    was taken for abandoned by whoever came first."""
    try:
        return os.stat(draft).st_nlink == 2
    except FileNotFoundError:
        return False


def _settle(path: Path) -> None:
    """Have its name on the disk, and no draft of it left, such as of processes that were killed as they wrote it."""
    _sync(path.parent)
    for abandoned in path.parent.glob(f".{path.name}.{_DRAFT}"):
        abandoned.unlink(missing_ok=True)


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _make(folder: Path) -> None:
    """``mkdir -p``, each new folder's entry synced."""
    if folder.is_dir():
        return
    _make(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
