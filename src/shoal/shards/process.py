"""``python -m shoal.shards.process``: a shard as a process of its own.

What it is to be comes as a JSON line on its input; it says where it listens in another, and then that it is alive with
an empty one now and then. More lines on its input tell where the others are, and it ends when that does.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from shoal.comm.keys import JobKey
from shoal.errors import ShoalError
from shoal.shards.order import BEAT_S, Order, Peers, parse
from shoal.shards.shard import Shard, shard_at
from shoal.tables import NUM_BUCKETS, TableSpec, batches
from shoal.tables.buckets import BucketMap
from shoal.tables.journal import Keeping
from shoal.tables.stored import JournalFolder
from shoal.tables.table import Table


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
    told = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115 - a thread may be reading it at the end
    is_spare = not select.select([told], [], [], 0)[0]
    if is_spare:
        warm_up()
    line = told.readline()
    if not line:  # it was not needed
        return 0
    order = msgspec.json.decode(line, type=Order)
    if order.log_path:
        with open(order.log_path, "ab") as log:
            os.dup2(log.fileno(), 2)
    try:
        key = JobKey.read(Path(order.key_path)) if order.key_path else None
        buckets = BucketMap.even(order.shards)
        listen = (order.host, order.port, key)
        shard = shard_at(order.name, Path(order.folder), buckets, _keeping(order), listen)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if not is_spare and JournalFolder(Path(order.folder)).contents() is None:  # else it replaces one that is missed
        warm_up()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: shard.stop())
    threading.Thread(target=_listen, args=(shard, told), daemon=True).start()
    os.write(1, msgspec.json.encode({"address": shard.address}) + b"\n")
    threading.Thread(target=_beat, daemon=True).start()
    try:
        shard.serve()
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _listen(shard: Shard, told: Iterable[bytes]) -> None:
    """To who has started it."""
    for line in told:
        shard.meet(msgspec.json.decode(line, type=Peers))
    shard.stop()


def _beat() -> None:
    """Tell who has started it that it is not frozen."""
    while True:
        time.sleep(BEAT_S)
        os.write(1, b"\n")


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # there is nothing to put in order, and an interpreter with compiled loops takes a while to do so
