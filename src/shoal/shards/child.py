"""A shard as a child of this process: started, told what it is to be and where the others are, and ended."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import msgspec

from shoal.errors import ShoalError
from shoal.shards.order import Order, Peers, standby_of

_START_S, _END_S = 300.0, 10.0


class ShardProcess:
    """``order`` None: a spare, which loads what a shard needs and waits until ``become`` says which it is.

    ``words`` come before its command, to start it elsewhere. What it says goes to ``log``, or to where this process's
    does.
    """

    def __init__(self, order: Order | None, words: Sequence[str] = (), log: Path | None = None) -> None:
        command = [*words, sys.executable, "-m", "shoal.shards.process"]
        with nullcontext() if log is None else log.open("ab") as errors:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=log is not None
            )
        assert self._child.stdout is not None
        os.set_blocking(self._child.stdout.fileno(), False)
        self._words, self._log = words, log
        self.address = ""
        self._heard_s = time.monotonic()
        if order is not None:
            self.become(order)

    def become(self, order: Order) -> None:
        """Be this shard."""
        self.order = order
        self._heard_s = time.monotonic()
        self._write(order)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def exit_code(self) -> int | None:
        """None as long as it runs."""
        return self._child.poll()

    def look(self) -> str:
        """Where it listens, or nothing as long as it does not. Called often, it also hears that it is alive."""
        assert self._child.stdout is not None
        while line := self._child.stdout.readline():
            self._heard_s = time.monotonic()
            if line.strip():
                self.address = msgspec.json.decode(line)["address"]
        return self.address

    @property
    def silent_s(self) -> float:
        """For so long it has not said that it is alive, once it listens; before that, for so long it has been
        starting."""
        return time.monotonic() - self._heard_s

    def wait(self) -> str:
        """Until it answers: its address. ``ShoalError`` if it does not."""
        assert self._child.stdout is not None
        select.select([self._child.stdout], [], [], _START_S)
        if not self.look():
            self.close()
            raise ShoalError(f"shard {self.order.name} did not start; its output above says why")
        return self.address

    def tell(self, addresses: Mapping[str, str]) -> None:
        """Where all shards are, itself among them."""
        self._write(Peers(addresses=dict(addresses), standby=standby_of(self.order.name, list(addresses))))

    def _write(self, told: Order | Peers) -> None:
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # that it has ended is seen elsewhere
            self._child.stdin.write(msgspec.json.encode(told) + b"\n")
            self._child.stdin.flush()

    def kill(self) -> None:
        """At once. One that cannot even be killed, for a disk that hangs, is left alone."""
        self._child.kill()
        with suppress(subprocess.TimeoutExpired):
            self.ended()

    def replaced(self) -> ShardProcess:
        """Another in its place, at the same address, with what it has left on the disk."""
        port = int(self.address.rsplit(":", 1)[1])
        return ShardProcess(msgspec.structs.replace(self.order, port=port), self._words, self._log)

    def ended(self) -> int:
        """Wait until it has ended by itself, and be done with it: its exit code."""
        code = self._child.wait(_END_S)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        return code

    def release(self) -> None:
        """Let it end, without waiting for that."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()

    def close(self) -> None:
        """Let it end."""
        self.release()
        try:
            self.ended()
        except subprocess.TimeoutExpired:
            self.kill()
