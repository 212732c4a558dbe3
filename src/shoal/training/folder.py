"""A run's folder: what is where."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import ConfigError


class Control(msgspec.Struct, frozen=True):
    """Where the run's coordinator listens."""

    address: str
    pid: int


@dataclass(frozen=True)
class RunFolder:
    """``run.json`` what the job resolved to; ``key`` who may take part; ``control.json`` where the coordinator is;
    ``events.jsonl`` what happened; ``logs/`` each process's output; ``versions/`` and ``generations/`` unless a store
    elsewhere holds them."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def key_path(self) -> Path:
        return self.path / "key"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def control_path(self) -> Path:
        return self.path / "control.json"

    def log_path(self, process: str) -> Path:
        folder = self.path / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{process}.log"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the run's one driver: an advisory lock, which ends with its process. ``ConfigError`` if another is."""
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise ConfigError(f"{self.name} is under way; `shoal status {self.name}` tells how it stands") from None
        finally:
            os.close(handle)

    @property
    def is_under_way(self) -> bool:
        """Whether a driver holds the run."""
        try:
            with self.held():
                return False
        except ConfigError:
            return True

    def write_record(self, record: dict[str, Any]) -> None:
        """Store what the run is made of."""
        _replace(self.path / "run.json", msgspec.json.format(msgspec.json.encode(record), indent=1))

    def read_record(self) -> dict[str, Any]:
        """What the run is made of; ``ConfigError`` if the folder is no run."""
        try:
            record: dict[str, Any] = msgspec.json.decode((self.path / "run.json").read_bytes())
        except FileNotFoundError:
            raise ConfigError(f"no such run: {self.path} has no run.json; `shoal runs` lists what there is") from None
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{self.path / 'run.json'} is damaged: {error}") from error
        return record

    def write_control(self, control: Control) -> None:
        _replace(self.control_path, msgspec.json.encode(control))

    def read_control(self) -> Control:
        """Where the coordinator listens; ``ConfigError`` if the run has none yet."""
        try:
            return msgspec.json.decode(self.control_path.read_bytes(), type=Control)
        except (FileNotFoundError, msgspec.MsgspecError):
            raise ConfigError(f"{self.path} has no coordinator; is the run under way?") from None


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
