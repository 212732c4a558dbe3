"""Which labs there are: a file for each, written before anything is made and removed after all is gone."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from shoal.errors import ConfigError


class Process(msgspec.Struct, frozen=True):
    """A process that cannot be mistaken for a later one of the same number. ``started``: in the kernel's ticks."""

    pid: int
    started: int

    @staticmethod
    def of(pid: int) -> Process:
        """One that is running now. ``ProcessLookupError`` if it is not."""
        started = _started(pid)
        if started is None:
            raise ProcessLookupError(pid)
        return Process(pid, started)

    @property
    def is_alive(self) -> bool:
        return _started(self.pid) == self.started


def _started(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return None if state == "Z" else int(fields[18])


class HostRecord(msgspec.Struct, frozen=True):
    """A host as it was made. ``group``: its cgroup, if it has one."""

    link: str
    delay_s: float
    cores: float | None = None
    group: str | None = None


class LabRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A lab. ``owner``: the process that is to take it down; None if it stays. ``helpers``: those that delay its links;
    ``warm``: the one that is forked for the hosts' Python processes."""

    name: str
    subnet: str
    hosts: tuple[HostRecord, ...]
    owner: Process | None
    helpers: tuple[Process, ...] = ()
    warm: Process | None = None
    folder: str | None = None

    @property
    def is_left_over(self) -> bool:
        """Whether who was to take it down has ended without doing so."""
        return self.owner is not None and not self.owner.is_alive


def folder() -> Path:
    """Where the records are: of this user, and gone after a restart where the system has a place for such things."""
    if os.environ.get("XDG_RUNTIME_DIR"):
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "shoal-lab"
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/shoal-lab")
    return Path(tempfile.gettempdir()) / f"shoal-lab-{os.getuid()}"


@contextmanager
def locked() -> Iterator[Path]:
    """The folder of records, with nobody else naming or numbering a lab."""
    path = folder()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to another user; remove it, or set XDG_RUNTIME_DIR")
    with (path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def path_of(name: str) -> Path:
    """The file that is there as long as the lab is."""
    return folder() / f"{name}.json"


def write(record: LabRecord) -> None:
    """Put a record in the place of the one before, if there is one."""
    path = path_of(record.name)
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(record))
    partial.replace(path)


def read(name: str) -> LabRecord:
    """The lab of this name. ``ConfigError`` if there is none, or its record cannot be read."""
    path = path_of(name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=LabRecord)
    except FileNotFoundError:
        raise ConfigError(f"there is no lab named {name!r}; `shoal lab status` lists those that there are") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is no record of a lab: {error}; remove it and what it made by hand") from None


def read_all() -> list[LabRecord]:
    """Every lab of this user, by name. One that is taken down meanwhile is passed over."""
    found = []
    for path in sorted(folder().glob("*.json")):
        if "." not in path.stem:
            try:
                found.append(read(path.stem))
            except ConfigError:
                if path.exists():
                    raise
    return found


def remove(name: str) -> None:
    """Forget a lab; one that is not known is passed over."""
    for path in (path_of(name), hosts_path(name), warm_path(name)):
        with suppress(FileNotFoundError):
            path.unlink()


def warm_path(name: str) -> Path:
    """The socket at which forks are asked for."""
    return folder() / f"{name}.warm"


def hosts_path(name: str) -> Path:
    """The file that tells a launcher how processes are started on the lab's hosts."""
    return folder() / f"{name}.hosts.json"
