"""Workers started by hand: ``shoal worker --join HOST:PORT`` on any machine that has the job file and the job's key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.comm.keys import JobKey
from shoal.comm.messages import Ask
from shoal.comm.reach import own_address
from shoal.errors import ConfigError
from shoal.launch.fleet import Gone, Place
from shoal.training.folder import RunFolder


class ManualFleet:
    """Starts nothing: says how to start a worker, and waits for whoever comes."""

    def __init__(self, about: dict[str, Any], listen: str | None) -> None:
        self.about = about
        self.host = (listen or "127.0.0.1:0").rpartition(":")[0]
        self.wake_fd: int | None = None
        self._told = False

    def settle(self, folder: RunFolder, record: dict[str, Any], say: Callable[[str], None]) -> None:
        """Where the run is."""
        self._folder, self._record = folder, record

    def places(self) -> list[Place]:
        return [Place(self.host)]

    def start(self, name: str, address: str) -> None:
        if not self._told:
            self._told = True
            file = Path(self._record["job_file"]).name
            print(f"start workers with: shoal worker {file} --join {address} --key {self._folder.key_path}", flush=True)

    def kill(self, name: str) -> None:
        return

    def gone(self) -> list[Gone]:
        return []

    def close(self) -> None:
        return


def join(path: Path, address: str, key_path: Path, name: str, host: str | None) -> int:
    """Be a worker of the run whose coordinator is at ``address``, until it ends. Returns the exit code."""
    from shoal.launch.rehearsal import prepared
    from shoal.launch.working import work
    from shoal.training.commanding import ask
    from shoal.training.kit import Assignment

    if ":" not in address:
        raise ConfigError(f"--join takes HOST:PORT, not {address!r}")
    key = JobKey.read(key_path)
    record = ask(address, key, Ask()).record
    job, job_hash = prepared(path, record["settings"])
    assignment = Assignment(
        name=name,
        address=address,
        key=key,
        store=record["store"],
        job_hash=job_hash,
        host=host or own_address(address),
    )
    return work(job, assignment)
