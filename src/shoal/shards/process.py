"""``python -m shoal.shards.process``: a shard as a process of its own.

What it is to be comes as a JSON line on its input; it says where it listens in another, and ends when its input does.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np

from shoal.comm.keys import JobKey
from shoal.errors import ShoalError
from shoal.shards.order import Order, parse
from shoal.tables import NUM_BUCKETS, TableSpec, batches
from shoal.tables.buckets import BucketMap
from shoal.tables.journal import Keeping
from shoal.tables.stored import JournalFolder
from shoal.tables.table import Table

_START_S = 300.0


class ShardProcess:
    """A shard as a child of this process."""

    def __init__(self, order: Order) -> None:
        self.order = order
        words = [sys.executable, "-m", "shoal.shards.process"]
        self._child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(msgspec.json.encode(order) + b"\n")
        self._child.stdin.flush()
        self.address = ""

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait(self) -> str:
        """Until it answers: its address. ``ShoalError`` if it does not."""
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], _START_S)
        line = self._child.stdout.readline() if ready else b""
        if not line:
            self.close()
            raise ShoalError(f"shard {self.order.name} did not start; its output above says why")
        self.address = msgspec.json.decode(line)["address"]
        return self.address

    def kill(self) -> None:
        """At once."""
        self._child.kill()
        self._end()

    def replaced(self) -> ShardProcess:
        """Another in its place, at the same address, with what it has left on the disk."""
        port = int(self.address.rsplit(":", 1)[1])
        return ShardProcess(msgspec.structs.replace(self.order, port=port))

    def close(self) -> None:
        """Let it end."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
        self._end()

    def _end(self) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.wait()
        self._child.stdin.close()
        self._child.stdout.close()


def _keeping(order: Order) -> Keeping:
    return Keeping(
        consistency=parse(order.consistency), num_lanes=order.num_lanes, durability=order.durability,
        memory_bytes=order.memory_bytes,
    )  # fmt: skip


def warm_up() -> None:
    """Have the loops of tables compiled, or found on disk, before anyone waits for them."""
    table, ids = Table(TableSpec(name="warm", dim=1), 1 << 16), np.arange(2)
    table.push(ids, np.zeros((2, 1), np.float32))
    table.pull(ids)
    everywhere = np.ones(NUM_BUCKETS, np.bool_)
    table.set_to(table.image_in(everywhere, -1))
    table.set_to(table.image_of(ids))
    table.drop(everywhere)
    table.image()
    batches.warm_up()
    batches.buckets_of(ids)


def main() -> int:
    from shoal.shards.shard import shard_at

    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    try:
        key = JobKey.read(Path(order.key_path)) if order.key_path else None
        buckets = BucketMap.even(order.shards)
        listen = (order.host, order.port, key)
        shard = shard_at(order.name, Path(order.folder), buckets, _keeping(order), listen)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if JournalFolder(Path(order.folder)).contents() is None:  # else it replaces one that is waited for
        warm_up()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: shard.stop())
    threading.Thread(target=_end_with_input, args=(shard.stop,), daemon=True).start()
    sys.stdout.buffer.write(msgspec.json.encode({"address": shard.address}) + b"\n")
    sys.stdout.flush()
    shard.serve()
    return 0


def _end_with_input(stop: object) -> None:
    while os.read(0, 1 << 12):
        pass
    assert callable(stop)
    stop()


if __name__ == "__main__":
    sys.exit(main())
