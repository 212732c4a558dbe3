"""A command in a lab of its own, which is there for as long as the command runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NoReturn, Self

import msgspec

from shoal.errors import ConfigError, ShoalError
from shoal.lab import kernel
from shoal.lab.cluster import Lab
from shoal.lab.faults import parse_faults
from shoal.lab.inflicting import inflicting
from shoal.lab.nodes import start_ray
from shoal.lab.spec import LabSpec

_GRACE_S = 60.0
_POLL_S = 1.0
_ENTER = 'mount -t tmpfs none /run && ip link set dev lo up && exec "$@"'


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to run, in what. ``faults``: the text of a file of faults. ``ray``: start a node of Ray on each host."""

    spec: LabSpec
    command: tuple[str, ...]
    faults: str = ""
    ray: bool = False


def run(order: Order) -> int:
    """Make the lab, run the command, take the lab down; the command's exit code, 128 + n if signal n ended it.

    The command runs on this machine, which each host reaches at the bridge's address, with ``SHOAL_HOSTS`` set so that
    `shoal train` starts its workers on the hosts; with ``ray`` it runs on host 0, with ``RAY_ADDRESS`` set. Ctrl-C,
    SIGTERM and SIGHUP go to the command, which has 60 s to end.
    """
    faults = parse_faults(order.faults, order.spec.hosts)
    if shutil.which(order.command[0]) is None:
        raise ConfigError(f"there is no command {order.command[0]!r} to be run in the lab")
    with Lab(order.spec) as lab:
        _say(f"{lab.name} is up: " + ", ".join(f"{host.name} {host.address}" for host in lab.hosts))
        env = start_ray(lab) if order.ray else lab.env
        with _Signals() as signals:
            signals.go_to(_start(lab, order, env))
            with inflicting(lab, faults, _say):
                return signals.wait()


def _start(lab: Lab, order: Order, env: dict[str, str]) -> subprocess.Popen[Any]:
    if order.ray:
        return lab.hosts[0].popen(order.command, env)
    return subprocess.Popen(order.command, env={**os.environ, **env})


class _Signals:
    """Within this, signals do not end this process but the command: it is told, and has a while to end.

    Ctrl-C reaches the command by itself, for it is in the terminal's foreground, as this process is.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[Any] | None = None
        self._pending: list[int] = []
        self._ends_by_s = float("inf")
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _: Any) -> None:
        self._ends_by_s = time.monotonic() + _GRACE_S
        if self._child is None:
            self._pending.append(number)
        elif number != signal.SIGINT:
            self._child.send_signal(number)

    def go_to(self, child: subprocess.Popen[Any]) -> None:
        """From now on signals go to the command; those that came before it was there go to it at once."""
        self._child = child
        for number in self._pending:
            child.send_signal(number)

    def wait(self) -> int:
        """To the command's end: its exit code. No handler may raise within: a status that has been fetched is lost."""
        assert self._child is not None
        while True:
            try:
                code = self._child.wait(_POLL_S)
                return 128 - code if code < 0 else code
            except subprocess.TimeoutExpired:
                if time.monotonic() > self._ends_by_s:
                    self._child.kill()


def run_as_user(order: Order) -> int:
    """``run`` for one who has not the right: in a user namespace of their own. Returns only by an error.

    There it may make interfaces and namespaces of its own, which nobody outside sees; so it reaches no network but the
    lab's. ``ConfigError`` where the kernel does not let users do so.
    """
    if reason := kernel.why_no_user_namespace():
        raise ConfigError(f"{kernel.why_not()}; a user namespace would do as well, but {reason}")
    text = msgspec.json.encode(order).decode()
    words = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--", "sh", "-c", _ENTER, "sh"]
    sys.stdout.flush()
    os.execvp("unshare", [*words, sys.executable, "-m", "shoal.lab.running", text])


def _say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


def main() -> NoReturn:
    try:
        code = run(msgspec.json.decode(sys.argv[1], type=Order))
    except KeyboardInterrupt:
        code = 130
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
