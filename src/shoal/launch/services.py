"""The folder of a service: who it is, its events, and the key by which it may be changed; for whoever asks later."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import ConfigError, Fault
from shoal.launch.run import runs_folder
from shoal.tables.files import write_whole

_KEY_BYTES = 24


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """``url``: where predictions are; ``admin_url``: where the service is changed. ``source``: what it serves."""

    name: str
    pid: int
    source: str
    url: str
    admin_url: str
    started_at: str
    grpc: str = ""


@dataclass(frozen=True)
class ServiceFolder:
    """Where what is. It stays when the service has ended."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def record_path(self) -> Path:
        return self.path / "service.json"

    @property
    def key_path(self) -> Path:
        """Of the key that whoever may change the service holds; a file that only its owner reads."""
        return self.path / "admin.key"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    def read(self) -> Record:
        """``ConfigError`` if there is no such service."""
        try:
            return msgspec.json.decode(self.record_path.read_bytes(), type=Record)
        except FileNotFoundError:
            raise ConfigError(f"there is no service {self.name}; `shoal status` lists those that there are") from None
        except msgspec.MsgspecError as error:
            raise Fault(f"{self.record_path} is damaged: {error}") from error

    def is_alive(self) -> bool:
        """Whether a process serves from here."""
        try:
            fd = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def claim(self) -> int:
        """Be the one that serves under this name, as long as the descriptor is open. ``ConfigError`` if another is, or
        if nothing can be written there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o755)
            fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"a service tells of itself in {self.path}, which cannot be written: {error}; "
                "name another folder with SHOAL_RUNS"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ConfigError(f"a service {self.name} runs already: end it, or choose another --name") from None
        return fd

    def write(self, record: Record) -> None:
        write_whole(self.record_path, msgspec.json.format(msgspec.json.encode(record), indent=1))

    def new_key(self) -> str:
        """A key for this start of the service."""
        key = secrets.token_urlsafe(_KEY_BYTES)
        with contextlib.suppress(FileNotFoundError):
            self.key_path.unlink()
        fd = os.open(self.key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(key + "\n")
        return key


def services_folder() -> Path:
    """Where services are kept: beside the runs."""
    return runs_folder() / ".services"


def list_services() -> list[ServiceFolder]:
    """Those that run, by name."""
    folders = [ServiceFolder(path) for path in sorted(services_folder().glob("*")) if path.is_dir()]
    return [folder for folder in folders if folder.record_path.exists() and folder.is_alive()]


def find_service(name: str | None) -> ServiceFolder:
    """A service that runs; without a name, the only one. ``ConfigError`` if there is none, or several."""
    running = list_services()
    if name is None and len(running) == 1:
        return running[0]
    names = ", ".join(folder.name for folder in running) or "none"
    if name is None:
        raise ConfigError(f"say which service: those that run are {names}")
    for folder in running:
        if folder.name == name:
            return folder
    raise ConfigError(f"no service {name} runs here; those that do are {names}")


def services_of(run: str) -> list[dict[str, Any]]:
    """The services of a run: what their admin ports tell, with their names and addresses."""
    found = []
    for folder in list_services():
        record = folder.read()
        if record.source == run:
            found.append({"service": folder.name, "url": record.url, **told(folder, "GET", "/status")})
    return found


def told(folder: ServiceFolder, method: str, path: str, demand: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a service answers on its admin port. ``ConfigError`` for a demand that it refuses, ``Fault`` if it does not
    answer."""
    from shoal.serving.client import demanded

    key = folder.key_path.read_text().strip()
    return demanded(method, folder.read().admin_url + path, key, demand)
