"""A lab that is up: its hosts, and what can be done to them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import msgspec

from shoal.errors import ConfigError
from shoal.lab import cgroups, kernel, making, plan, records
from shoal.lab.records import LabRecord, Process
from shoal.lab.spec import LabSpec, Link, check_name, host_number, parse_cores


@dataclass(frozen=True)
class Host:
    """A host of a lab: a network namespace with an address. ``prefix`` are the words that run a command on it."""

    lab: str
    number: int
    address: str
    prefix: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"h{self.number}"

    @property
    def namespace(self) -> str:
        """The host's name among `ip netns`."""
        return plan.namespace(self.lab, self.number)

    def popen(self, command: Sequence[str], env: Mapping[str, str] | None = None, **how: Any) -> subprocess.Popen[Any]:
        """Start a command on the host. ``env`` is added to the environment; ``how`` is what ``subprocess.Popen`` takes.

        Its process is the command's own, or in a warm lab one that stands in for it and ends with it; it is on the host
        when this returns, so that ``Lab.kill`` finds it.
        """
        child = subprocess.Popen([*self.prefix, *command], env={**os.environ, **(env or {})}, **how)
        kernel.wait_until_in(self.namespace, child)
        return child

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, **how: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command on the host to its end; ``how`` is what ``subprocess.run`` takes."""
        return subprocess.run([*self.prefix, *command], env={**os.environ, **(env or {})}, **how)

    def pids(self) -> list[int]:
        """The processes that run on the host."""
        return kernel.pids(self.namespace)


class Lab:
    """A cluster in a box. ``with Lab(LabSpec(hosts=4, link="100mbit")) as lab:`` makes it, and takes it down again.

    It is taken down at the end of the block, by an exception, Ctrl-C, SIGTERM or SIGHUP (in the main thread). What a
    SIGKILL leaves, ``shoal lab down NAME`` removes. Hosts are given as a ``Host`` or its number. ``ConfigError`` where
    this process has not the right, for a name in use, and for a lab that cannot be made; nothing is left then. 4 hosts
    take about 0.3 s.
    """

    def __init__(self, spec: LabSpec) -> None:
        self.spec = spec
        self._record: LabRecord | None = None
        self._helpers: list[subprocess.Popen[Any]] = []
        self._handlers_before: dict[int, Any] = {}

    @staticmethod
    def find(name: str) -> Lab:
        """A lab that is up, made by this process or another."""
        record = records.read(name)
        links = [f"{n}={host.link}" for n, host in enumerate(record.hosts)]
        lab = Lab(LabSpec(hosts=len(record.hosts), link=links, name=name, warm=record.warm is not None))
        lab._record = record
        return lab

    def __enter__(self) -> Lab:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._handlers_before[number] = signal.signal(number, _end_by_signal)
        try:
            return self.up()
        except BaseException:
            self._restore_handlers()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.down()
        finally:
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}

    def up(self, *, stays: bool = False) -> Lab:
        """Make it. ``stays``: it is meant to outlive this process, and is not called left over then."""
        if reason := kernel.why_not():
            raise ConfigError(reason)
        name = self.spec.name or f"lab{secrets.token_hex(2)}"
        check_name(name)
        self._record = making.claim(name, self.spec.each(), None if stays else Process.of(os.getpid()))
        try:
            self._record, self._helpers = making.make(self._record, self.spec)
            records.hosts_path(name).write_bytes(msgspec.json.encode(self._for_launcher()))
        except BaseException:
            self._record = records.read(name)
            self.down()
            raise
        return self

    def _for_launcher(self) -> dict[str, Any]:
        hosts = [{"name": h.name, "address": h.address, "exec": list(h.prefix)} for h in self.hosts]
        return {"driver": self.address, "hosts": hosts}

    def down(self) -> None:
        """Kill all that runs on the hosts, and remove them. Once more does nothing."""
        if self._record is None:
            return
        with _undisturbed():
            making.unmake(self._record)
            for helper in self._helpers:
                helper.wait()
            self._record = None

    @property
    def record(self) -> LabRecord:
        """How it was made."""
        if self._record is None:
            raise ConfigError("the lab is not up: use it in `with Lab(spec) as lab:`, or call up()")
        return self._record

    def keep(self, record: LabRecord) -> None:
        """Write down what else there is to be removed in the end."""
        self._record = record
        records.write(record)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def address(self) -> str:
        """This machine's own address on the bridge, which every host reaches."""
        return plan.bridge_address(self.record.subnet)

    @property
    def hosts(self) -> tuple[Host, ...]:
        record = self.record
        return tuple(
            Host(record.name, n, plan.address(record.subnet, n), making.prefix(record, n))
            for n in range(len(record.hosts))
        )

    @property
    def env(self) -> dict[str, str]:
        """What a command of this machine needs to use the hosts: ``SHOAL_HOSTS``, and the lab's name."""
        return {"SHOAL_LAB": self.name, "SHOAL_HOSTS": str(records.hosts_path(self.name))}

    def host(self, which: Host | int | str) -> Host:
        """A host by its number or name. ``ConfigError`` if there is none such."""
        if isinstance(which, Host):
            return which
        return self.hosts[host_number(str(which), len(self.record.hosts))]

    def cut(self, host: Host | int) -> None:
        """Its link carries nothing; what runs on it goes on."""
        kernel.do([plan.cut(self.name, self.host(host).number)])

    def heal(self, host: Host | int) -> None:
        """Its link carries again, and it is no longer set apart."""
        number = self.host(host).number
        kernel.do([plan.heal(self.name, number), plan.part(self.name, number, on=False)])

    def part(self, *hosts: Host | int) -> None:
        """These hosts no longer reach each other; each still reaches all others, and this machine."""
        kernel.do([plan.part(self.name, self.host(host).number, on=True) for host in hosts])

    def slow(self, host: Host | int, link: str | None = None) -> None:
        """Give its link another rate, such as ``10mbit`` or ``10mbit/100mbit``; None: the one it was made with."""
        number = self.host(host).number
        made = self.record.hosts[number]
        making.shape(self.record, number, Link.parse(link or made.link))

    def kill(self, host: Host | int) -> int:
        """SIGKILL to all that runs on it; how many processes. The host itself stays, with nothing running."""
        return kernel.kill_all(self.host(host).namespace)

    def freeze(self, host: Host | int) -> int:
        """SIGSTOP to all that runs on it; how many processes. Its kernel still answers: connections stay open."""
        return kernel.stop_all(self.host(host).namespace)

    def thaw(self, host: Host | int) -> None:
        """SIGCONT to all that runs on it."""
        kernel.signal_all(signal.SIGCONT, self.host(host).pids())

    def cpu(self, host: Host | int, cores: float | None) -> None:
        """Let what runs on it use so many cores from now on, such as 0.33; None: all.

        ``ConfigError`` where there are no cgroups that this process may write.
        """
        group = self.record.hosts[self.host(host).number].group
        if group is None:
            raise cgroups.needed()
        cgroups.limit(Path(group), None if cores is None else parse_cores(str(cores)))

    def bytes(self, host: Host | int) -> tuple[int, int]:
        """Bytes that it has sent and received since the lab was made, by the kernel's count at its link's far end."""
        return kernel.counters(plan.outer(self.name, self.host(host).number))

    def measure(self, sender: Host | int, receiver: Host | int, duration_s: float = 1.0) -> float:
        """The rate, in bits of payload a second, at which one TCP connection carries from one host to another.

        Of a link's rate, 95.6 % can be payload. Leaves out the first third, in which TCP starts and bursts are spent.
        """
        to = self.host(receiver)
        module = [sys.executable, "-m", "shoal.lab.measuring"]
        receive = to.popen([*module, "receive", to.address, str(duration_s)], stdout=subprocess.PIPE, text=True)
        assert receive.stdout is not None
        with receive, receive.stdout:
            port = receive.stdout.readline().strip()
            send = self.host(sender).run([*module, "send", to.address, port, str(duration_s)], check=False)
            if send.returncode:
                receive.kill()
            rate = receive.stdout.readline().strip()
        if send.returncode or not rate:
            raise ConfigError(f"h{self.host(sender).number} does not reach {to.name}; is one of them cut off?")
        return float(rate)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that would end this process wait until it is done, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _end_by_signal(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def labs() -> list[LabRecord]:
    """The labs of this user that there are, by name; also those that a crashed run left over."""
    return records.read_all()


def discard(name: str) -> None:
    """Take down a lab, whoever made it, also one that a crashed run left half made.

    A process that is still to take it down is told to by SIGTERM, and given 10 seconds.
    """
    record = records.read(name)
    if record.owner is not None and record.owner.pid != os.getpid():
        making.end_owner(record.owner, records.path_of(name))
    making.unmake(record)
