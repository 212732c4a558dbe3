"""What the lab has the kernel do, and what it reads from it: links, limits, counters, processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError, Fault
from shoal.lab.plan import Command

_POLL_S = 0.005
_DIE_S = 30.0


def why_not() -> str:
    """Why this process cannot make a lab here, or nothing. Costs a few milliseconds."""
    if not sys.platform.startswith("linux"):
        return "a lab needs Linux: it is made of network namespaces"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"a lab needs {' and '.join(missing)}, of iproute2: apt install iproute2"
    if os.geteuid() != 0:
        return "a lab needs the right to make network namespaces: run as root, or use `shoal lab run`"
    name = f"shoal-try-{os.getpid()}"
    made = _run(("ip", "netns", "add", name))
    if made.returncode:
        return f"a lab needs the right to make network namespaces, and the kernel says: {made.stderr.strip()}"
    carried = _run(("ip", "link", "add", "name", f"{name[-11:]}br", "type", "bridge"))
    _run(("ip", "link", "del", "dev", f"{name[-11:]}br"))
    _run(("ip", "netns", "del", name))
    return f"a lab needs bridges, and the kernel says: {carried.stderr.strip()}" if carried.returncode else ""


def why_no_user_namespace() -> str:
    """Why a user who is not root cannot have a namespace in which they are, or nothing."""
    if shutil.which("unshare") is None:
        return "that needs unshare, of util-linux"
    tried = _run(
        ("unshare", "--user", "--map-root-user", "--net", "--mount", "--", "mount", "-t", "tmpfs", "x", "/run")
    )
    return f"the kernel does not let users make one: {tried.stderr.strip()}" if tried.returncode else ""


def _run(command: Command) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def do(commands: Iterable[Command]) -> None:
    """Run them in order. ``ConfigError`` for what is there already, ``Fault`` for what else the kernel refuses."""
    for command in commands:
        ran = _run(command)
        if ran.returncode:
            said = ran.stderr.strip().removeprefix("RTNETLINK answers: ")
            if "File exists" in said:
                raise ConfigError(f"`{' '.join(command)}`: there is one already; choose another name, or delete it")
            raise Fault(f"`{' '.join(command)}` failed: {said}")


def can(command: Command) -> bool:
    """Run it; whether that worked."""
    return _run(command).returncode == 0


def used_networks() -> list[str]:
    """The networks that this machine has an address in or a route to."""
    found = [route.get("dst", "default") for route in _asked(("ip", "-j", "-4", "route", "show", "table", "all"))]
    for link in _asked(("ip", "-j", "-4", "addr")):
        found += [f"{a['local']}/{a['prefixlen']}" for a in link.get("addr_info", ())]
    return [network for network in found if network[:1].isdigit()]


def _asked(command: Command) -> list[dict[str, Any]]:
    ran = _run(command)
    if ran.returncode:
        raise Fault(f"`{' '.join(command)}` failed: {ran.stderr.strip()}")
    value: list[dict[str, Any]] = json.loads(ran.stdout or "[]")
    return value


def is_up(dev: str) -> bool | None:
    """Whether packets may pass an interface; None if it is not there."""
    ran = _run(("ip", "-j", "link", "show", "dev", dev))
    return None if ran.returncode else "UP" in json.loads(ran.stdout)[0]["flags"]


def limit(space: str | None, dev: str) -> int | None:
    """The rate, in bits a second, that an interface is limited to at this moment, by the kernel's own account."""
    where = ("-n", space) if space else ()
    for qdisc in _asked(("tc", *where, "-j", "qdisc", "show", "dev", dev)):
        if qdisc["kind"] == "tbf":
            return int(qdisc["options"]["rate"]) * 8
    return None


def counters(dev: str, text: str | None = None) -> tuple[int, int]:
    """Bytes that an interface has received and sent. ``text``: /proc/net/dev, if it was read already."""
    for line in (text or Path("/proc/thread-self/net/dev").read_text()).splitlines():
        name, colon, fields = line.partition(":")
        if colon and name.strip() == dev:
            numbers = fields.split()
            return int(numbers[0]), int(numbers[8])
    raise Fault(f"there is no interface {dev}; is the lab still there?")


def namespace_path(space: str) -> Path:
    """The file that stands for a named namespace."""
    return Path("/run/netns") / space


def pids(space: str) -> list[int]:
    """The processes in a namespace; none if there is no such namespace."""
    try:
        its = os.stat(namespace_path(space))
    except FileNotFoundError:
        return []
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and _is_in(entry, its):
            found.append(int(entry))
    return found


def _is_in(pid: str | int, its: os.stat_result) -> bool:
    try:
        own = os.stat(f"/proc/{pid}/ns/net")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return (own.st_ino, own.st_dev) == (its.st_ino, its.st_dev)


def wait_until_in(space: str, child: subprocess.Popen[Any]) -> None:
    """Return when a process that was told to enter a namespace has, or has ended."""
    its = os.stat(namespace_path(space))
    while child.poll() is None and not _is_in(child.pid, its):
        time.sleep(_POLL_S / 5)


def signal_all(number: signal.Signals, targets: Sequence[int]) -> None:
    """Send a signal to processes, some of which may have ended."""
    for pid in targets:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_all(space: str) -> int:
    """SIGKILL to all that runs in a namespace, until nothing does; how many there were."""
    killed: set[int] = set()
    deadline_s = time.monotonic() + _DIE_S
    while found := pids(space):
        signal_all(signal.SIGKILL, found)
        killed.update(found)
        if time.monotonic() > deadline_s:
            raise Fault(f"processes {found} in {space} did not end within {_DIE_S:g} s of SIGKILL")
        time.sleep(_POLL_S)
    return len(killed)


def stop_all(space: str) -> int:
    """SIGSTOP to all that runs in a namespace, also to what it starts meanwhile, until all stand still; how many."""
    deadline_s = time.monotonic() + _DIE_S
    while moving := [pid for pid in pids(space) if state(pid) not in "TtZ"]:
        signal_all(signal.SIGSTOP, moving)
        if time.monotonic() > deadline_s:
            raise Fault(f"processes {moving} in {space} did not stop within {_DIE_S:g} s of SIGSTOP")
        time.sleep(_POLL_S)
    return len(pids(space))


def state(pid: int) -> str:
    """A process's state in the kernel's letter: T is stopped, and Z, here, also gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
