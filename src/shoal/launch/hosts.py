"""Workers on hosts that a command can be run on: those of a lab, or whatever ``SHOAL_HOSTS`` names.

``SHOAL_HOSTS`` is the path of a JSON file: ``{"driver": ADDRESS, "hosts": [{"name", "address", "exec": [WORDS]}]}``.
``driver`` is the address at which the hosts reach this machine; ``exec`` are the words before a command that run it on
the host, in this folder. Job, key and data are at the same paths there: code does not travel.

``python -m shoal.launch.hosts`` is the host's end: a nursery, which ends with its workers when its input does. Those
that workers will start on load the job and try it before there is a run.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn, cast

import msgspec

from shoal.errors import Bug, ConfigError, ShoalError
from shoal.launch.fleet import Gone, Place
from shoal.launch.nursery import Command, Nursery, Start, first_answer, gpu_for, warm_up
from shoal.training.folder import RunFolder

VARIABLE = "SHOAL_HOSTS"

_TRY = "--try"
_LAST_WORDS_S = 2.0
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


@dataclass
class _Ward:
    """A host's nursery, and who was started there and has not ended."""

    host: Host
    child: subprocess.Popen[bytes]
    workers: dict[str, int] = field(default_factory=dict)
    """Their process ids; 0 until they are known."""
    gpus: dict[str, int | None] = field(default_factory=dict)
    said: list[bytes] = field(default_factory=list)
    """Its output, as long as there is no log for it."""
    has_said_all: threading.Event = field(default_factory=threading.Event)

    def tell(self, command: Command) -> None:
        """One that has ended is told nothing; its reader says so."""
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):
            self.child.stdin.write(msgspec.json.encode(command) + b"\n")
            self.child.stdin.flush()

    def end(self) -> None:
        """SIGKILL to it and its workers: it leads a session of its own."""
        if self.child.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)


class HostsFleet:
    """Has a nursery on every host that has had a worker: to load torch there takes seconds, and a worker after that
    about 50 ms. A worker starts on the least used host that answers. The first ``num_workers`` hosts load the job now.

    ``about`` is what the record holds of the job; ``ConfigError`` if it cannot be run. A worker has one thread unless
    the job says otherwise.
    """

    def __init__(self, job_file: Path, settings: Sequence[str], num_workers: int) -> None:
        self._hosts = Hosts.of_environment()
        self.host = self._hosts.driver
        self._job_file = str(job_file.resolve())
        self._settings = tuple(settings)
        self._wards: dict[str, _Ward] = {}
        self._ended: list[Gone] = []
        self._lock = threading.Lock()
        self._folder: RunFolder | None = None
        read_end, self._waker = os.pipe()
        os.set_blocking(read_end, False)
        self.wake_fd: int | None = read_end
        self._answers: SimpleQueue[tuple[_Ward, dict[str, Any]]] = SimpleQueue()
        try:
            self.about = self._loaded(num_workers)
        except BaseException:
            self.close()
            raise

    def _loaded(self, num_workers: int) -> dict[str, Any]:
        """What is said of the job by the first host to have tried it."""
        live = live_hosts(self._hosts.hosts)
        hosts = [host for host in self._hosts.hosts if host.name in live] or self._hosts.hosts
        num_trying = len([self._new_ward(host, _TRY) for host in hosts[:num_workers]])
        while True:
            ward, answer = self._answers.get()
            num_trying -= "ended" in answer
            if "ended" not in answer or not num_trying:
                break
        try:
            return first_answer(answer)
        except ShoalError:
            for each in self._wards.values() if "ended" in answer else [ward]:
                each.end()
                each.has_said_all.wait(_LAST_WORDS_S)
                sys.stderr.write(b"".join(each.said).decode(errors="replace"))
            sys.stderr.flush()
            raise

    def settle(self, folder: RunFolder, record: dict[str, Any], say: Callable[[str], None]) -> None:
        """Where the run is that workers are started for."""
        self._record = record
        with self._lock:
            self._folder = folder
            wards = list(self._wards.values())
        for ward in wards:
            self._write_log(ward)
        say(f"workers start on {', '.join(host.name for host in self._hosts.hosts)} ({VARIABLE})")

    def places(self) -> list[Place]:
        return [Place(host.address, host.exec) for host in self._hosts.hosts]

    def start(self, name: str, address: str) -> None:
        if self._folder is None:
            raise Bug("settle the fleet before workers are started")
        ward = self._ward(self._place())
        with self._folder.log_path(name).open("ab") as log:
            log.write(f"on {ward.host.name}, {ward.host.address}\n".encode())
        with self._lock:
            ward.workers[name] = 0
            ward.gpus = {other: gpu for other, gpu in ward.gpus.items() if other in ward.workers}
            ward.gpus[name] = gpu_for(self.about, ward.gpus.values())
        ward.tell(Command(start=self._told(name, address, ward)))
        if ward.child.poll() is not None:  # it may have ended before it was to have a worker
            self._tell_ended(ward, name, f"the process that starts workers on {ward.host.name} has ended")

    def _place(self) -> Host:
        with self._lock:
            used = {name: len(ward.workers) for name, ward in self._wards.items()}
        return least_used(self._hosts.hosts, used, live_hosts(self._hosts.hosts))

    def _ward(self, host: Host) -> _Ward:
        """The host's nursery; a new one, where there is none that lives."""
        with self._lock:
            found = self._wards.get(host.name)
        return found if found is not None and found.child.poll() is None else self._new_ward(host)

    def _new_ward(self, host: Host, *flags: str) -> _Ward:
        command = [*host.exec, sys.executable, "-m", "shoal.launch.hosts", *flags, self._job_file, *self._settings]
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise ConfigError(f"{command[0]}, with which {VARIABLE} has {host.name} run commands: {error}") from None
        ward = _Ward(host, child)
        with self._lock:
            self._wards[host.name] = ward
        for reads in (self._read, self._listen):
            threading.Thread(target=reads, args=(ward,), name=f"reads {host.name}", daemon=True).start()
        return ward

    def _listen(self, ward: _Ward) -> None:
        """Its output goes to a log of the run's, and is kept until there is one."""
        assert ward.child.stderr is not None
        with ward.child.stderr as output:
            for line in output:
                with suppress(OSError):
                    self._write_log(ward, line)
        ward.has_said_all.set()

    def _write_log(self, ward: _Ward, line: bytes = b"") -> None:
        with self._lock:
            ward.said.append(line)
            if self._folder is not None:
                with self._folder.log_path(f"nursery-{ward.host.name}").open("ab") as log:
                    log.write(b"".join(ward.said))
                ward.said.clear()

    def _told(self, name: str, address: str, ward: _Ward) -> Start:
        assert self._folder is not None
        return Start(
            name=name,
            address=address,
            key_path=str(self._folder.key_path),
            store=self._record["store"],
            job_hash=self._record["identity"]["job_hash"],
            host=ward.host.address,
            log=str(self._folder.log_path(name)),
            num_threads=1,
            gpu=ward.gpus[name],
        )

    def _read(self, ward: _Ward) -> None:
        """What a nursery answers, to its end, which is that of its workers too."""
        assert ward.child.stdout is not None
        for line in ward.child.stdout:
            try:
                answer = msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.MsgspecError:  # what a login prints
                with suppress(OSError):
                    self._write_log(ward, line)
                continue
            if "ready" in answer or "refused" in answer:
                self._answers.put((ward, answer))
            if "started" in answer:
                with self._lock:
                    if answer["started"] in ward.workers:
                        ward.workers[answer["started"]] = answer["pid"]
            elif "exited" in answer:
                self._tell_ended(ward, answer["exited"], answer["reason"])
            elif "refused" in answer:
                for name in list(ward.workers):
                    assert self._folder is not None
                    self._folder.log_path(name).write_text(f"error: {answer['refused']['message']}\n")
                    self._tell_ended(ward, name, f"exited with {answer['refused']['exit_code']}")
        ward.child.wait()
        self._answers.put((ward, {"ended": f"the process that was to load the job on {ward.host.name} has ended"}))
        for name in list(ward.workers):
            self._tell_ended(ward, name, f"the process that starts workers on {ward.host.name} has ended")

    def _tell_ended(self, ward: _Ward, name: str, reason: str) -> None:
        with self._lock:
            if ward.workers.pop(name, None) is None:
                return
            self._ended.append(Gone(name, reason))
            if self._waker >= 0:
                os.write(self._waker, b".")

    def kill(self, name: str) -> None:
        """A host's only worker ends with its nursery, which may be as frozen as it is."""
        with self._lock:
            ward = next((ward for ward in self._wards.values() if name in ward.workers), None)
        if ward is None:
            return
        if len(ward.workers) == 1:
            ward.end()
        else:
            ward.tell(Command(kill=name))

    def gone(self) -> list[Gone]:
        if self.wake_fd is not None:
            with suppress(BlockingIOError):
                os.read(self.wake_fd, 1 << 12)
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        for ward in self._wards.values():
            ward.end()
            ward.child.wait()
            assert ward.child.stdin is not None
            with suppress(BrokenPipeError):
                ward.child.stdin.close()
        self._wards.clear()
        with self._lock:
            if self.wake_fd is not None:
                os.close(self.wake_fd)
                os.close(self._waker)
                self.wake_fd, self._waker = None, -1


def main() -> NoReturn:
    """``python -m shoal.launch.hosts [--try] JOB_FILE [FIELD=VALUE ...]``: a nursery, on a host."""
    tries, words = sys.argv[1] == _TRY, [word for word in sys.argv[1:] if word != _TRY]
    path, settings = Path(words[0]), words[1:]

    def load() -> tuple[Any, dict[str, Any]]:
        warm_up()
        from shoal.launch.rehearsal import prepared, tried

        return tried(path, settings) if tries else (prepared(path, settings)[0], {})

    answers = os.dup(1)
    os.dup2(2, 1)
    cast(TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    Nursery(0, answers, load).serve()
    sys.stderr.flush()
    os._exit(0)  # there is nothing to put in order, and an interpreter with torch in it takes seconds to do so


if __name__ == "__main__":
    main()
