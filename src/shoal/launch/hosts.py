"""Workers on hosts that a command can be run on: those of a lab, or whatever ``SHOAL_HOSTS`` names.

``SHOAL_HOSTS`` is the path of a JSON file: ``{"driver": ADDRESS, "hosts": [{"name", "address", "exec": [WORDS]}]}``.
``driver`` is the address at which the hosts reach this machine; ``exec`` are the words before a command that run it on
the host, in this folder. Job, key and data are at the same paths there: code does not travel.

``python -m shoal.launch.hosts`` is the worker's end: it reads from its input what it is to be, and ends when that ends.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from shoal.errors import Bug, ConfigError, ShoalError
from shoal.launch.fleet import Gone
from shoal.launch.nursery import Start
from shoal.training.folder import RunFolder

VARIABLE = "SHOAL_HOSTS"

_PROBE_S = 0.3
_PROBED_PORT = 9


class Host(msgspec.Struct, frozen=True):
    """Where a process can be started. ``exec``: the words before its command."""

    name: str
    address: str
    exec: tuple[str, ...]


class Hosts(msgspec.Struct, frozen=True):
    """What the file says. ``driver``: the address that the hosts reach this machine at."""

    driver: str
    hosts: tuple[Host, ...]

    @staticmethod
    def of_environment() -> Hosts:
        """``ConfigError`` if ``SHOAL_HOSTS`` is not set, or is no such file."""
        path = os.environ.get(VARIABLE)
        if not path:
            raise ConfigError(f"on='hosts' needs {VARIABLE}, the path of a file of hosts; `shoal lab run` sets it")
        try:
            read = msgspec.json.decode(Path(path).read_bytes(), type=Hosts)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{VARIABLE} names {path}, which is no file of hosts: {error}") from None
        if not read.hosts:
            raise ConfigError(f"{path} ({VARIABLE}) names no host")
        return read


def least_used(hosts: Sequence[Host], used: Mapping[str, int], live: Collection[str]) -> Host:
    """The live host with the fewest workers, and of those the first; if none is live, the same of all."""
    choice = [host for host in hosts if host.name in live] or list(hosts)
    return min(choice, key=lambda host: used.get(host.name, 0))


def live_hosts(hosts: Sequence[Host]) -> frozenset[str]:
    """The names of the hosts that answer within 0.3 s. One whose kernel refuses a connection is there."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = pool.map(_answers, [host.address for host in hosts])
        return frozenset(host.name for host, ok in zip(hosts, answers, strict=True) if ok)


def _answers(address: str) -> bool:
    with socket.socket() as probe:
        probe.settimeout(_PROBE_S)
        try:
            return probe.connect_ex((address, _PROBED_PORT)) in (0, errno.ECONNREFUSED)
        except OSError:
            return False


class Posted(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told on its input."""

    job_file: str
    settings: tuple[str, ...]
    start: Start


class HostsFleet:
    """Starts a worker on the least used host that answers, within the 2 to 3 seconds that torch takes to load.

    ``about`` is what the record holds of the job. A worker has one thread unless the job says otherwise.
    """

    def __init__(self, about: dict[str, Any], job_file: Path, settings: Sequence[str]) -> None:
        self.about = about
        self._hosts = Hosts.of_environment()
        self.host = self._hosts.driver
        self._job_file = str(job_file.resolve())
        self._settings = tuple(settings)
        self._children: dict[str, tuple[subprocess.Popen[bytes], Host]] = {}
        self._ended: list[Gone] = []
        self._lock = threading.Lock()
        self._folder: RunFolder | None = None
        read_end, self._waker = os.pipe()
        os.set_blocking(read_end, False)
        self.wake_fd: int | None = read_end

    def settle(self, folder: RunFolder, record: dict[str, Any], say: Callable[[str], None]) -> None:
        """Where the run is that workers are started for."""
        self._folder, self._record = folder, record
        say(f"workers start on {', '.join(host.name for host in self._hosts.hosts)} ({VARIABLE})")

    def start(self, name: str, address: str) -> None:
        if self._folder is None:
            raise Bug("settle the fleet before workers are started")
        host = self._place()
        posted = Posted(job_file=self._job_file, settings=self._settings, start=self._told(name, address, host))
        with self._folder.log_path(name).open("ab") as log:
            log.write(f"on {host.name}, {host.address}\n".encode())
            log.flush()
            child = subprocess.Popen(
                [*host.exec, sys.executable, "-m", "shoal.launch.hosts"],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env={"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **os.environ},
            )  # fmt: skip
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which its waiter will tell
            child.stdin.write(msgspec.json.encode(posted) + b"\n")
            child.stdin.flush()
        self._children[name] = child, host
        threading.Thread(target=self._wait, args=(name, child), name=f"waits for {name}", daemon=True).start()

    def _place(self) -> Host:
        with self._lock:
            used = Counter(host.name for child, host in self._children.values() if child.returncode is None)
        return least_used(self._hosts.hosts, used, live_hosts(self._hosts.hosts))

    def _told(self, name: str, address: str, host: Host) -> Start:
        assert self._folder is not None
        return Start(
            name=name,
            address=address,
            key_path=str(self._folder.key_path),
            store=self._record["store"],
            job_hash=self._record["identity"]["job_hash"],
            host=host.address,
            log=str(self._folder.log_path(name)),
            num_threads=1,
        )

    def _wait(self, name: str, child: subprocess.Popen[bytes]) -> None:
        code = child.wait()
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        with self._lock:
            self._ended.append(Gone(name, reason))
            if self._waker >= 0:
                os.write(self._waker, b".")

    def kill(self, name: str) -> None:
        if name in self._children:
            _kill(self._children[name][0])

    def gone(self) -> list[Gone]:
        if self.wake_fd is not None:
            with suppress(BlockingIOError):
                os.read(self.wake_fd, 1 << 12)
        with self._lock:
            ended, self._ended = self._ended, []
        for gone in ended:
            child, _ = self._children.pop(gone.name)
            assert child.stdin is not None
            child.stdin.close()
        return ended

    def close(self) -> None:
        for child, _ in self._children.values():
            _kill(child)
            child.wait()
            assert child.stdin is not None
            child.stdin.close()
        self._children.clear()
        with self._lock:
            if self.wake_fd is not None:
                os.close(self.wake_fd)
                os.close(self._waker)
                self.wake_fd, self._waker = None, -1


def _kill(child: subprocess.Popen[bytes]) -> None:
    """With what it has started: it leads a session of its own."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def be_worker() -> int:
    """Read what to be, and be it to the end of the run, or of the driver."""
    line = sys.stdin.buffer.readline()
    posted = msgspec.json.decode(line, type=Posted)
    threading.Thread(target=_end_with_driver, daemon=True).start()

    import torch

    from shoal.comm.keys import JobKey
    from shoal.launch.rehearsal import prepared
    from shoal.launch.working import work
    from shoal.training.kit import Assignment

    job, job_hash = prepared(Path(posted.job_file), posted.settings)
    start = posted.start
    torch.set_num_threads(job.num_threads or start.num_threads)
    key = JobKey.read(Path(start.key_path))
    assignment = Assignment(
        name=start.name, address=start.address, key=key, store=start.store, job_hash=job_hash, host=start.host
    )
    return work(job, assignment)


def _end_with_driver() -> None:
    os.read(0, 1)
    os._exit(1)


def main() -> NoReturn:
    try:
        code = be_worker()
    except ShoalError as error:
        print(f"error: {error}")
        code = error.exit_code
    sys.stdout.flush()
    os._exit(code)  # there is nothing to put in order, and an interpreter with torch in it takes seconds to do so


if __name__ == "__main__":
    main()
