"""Real shards, as processes of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.comm.keys import JobKey
from shoal.shards.child import ShardProcess
from shoal.shards.client import Client
from shoal.shards.order import Order
from shoal.tables.buckets import BucketMap


class Shards:
    """Some shards and how to speak to them."""

    def __init__(self, folder: Path, num: int, how: dict) -> None:
        self.key = JobKey.make()
        self.key.write(folder / "key")
        self.names = [f"s{number}" for number in range(num)]
        self.buckets = BucketMap.even(self.names)
        self.clients: list[Client] = []
        self.running = {
            name: ShardProcess(
                Order(name=name, folder=str(folder / name), shards=self.names, key_path=str(folder / "key"),
                      memory_bytes=1 << 24, **how)
            )
            for name in self.names
        }  # fmt: skip
        self.addresses = {name: shard.wait() for name, shard in self.running.items()}
        self.folder = folder
        self._tell()

    def _tell(self) -> None:
        for shard in self.running.values():
            shard.tell({name: other.address for name, other in self.running.items()})

    def client(self, worker: str = "w0", **how) -> Client:
        client = Client(self.key, self.buckets, self.addresses, worker=worker, **how)
        self.clients.append(client)
        return client

    def kill(self, name: str, *, with_disk: bool = False) -> None:
        """And have another take its place; ``with_disk``: what it has written is gone, too."""
        self.running[name].kill()
        if with_disk:
            shutil.rmtree(self.folder / name)
        self.running[name] = self.running[name].replaced()
        self.running[name].wait()
        self._tell()

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for shard in self.running.values():
            shard.close()


@pytest.fixture
def shards(tmp_path) -> Iterator[Callable[..., Shards]]:
    made: list[Shards] = []

    def make(num: int = 2, **how) -> Shards:
        folder = tmp_path / str(len(made))
        folder.mkdir(exist_ok=True)
        made.append(Shards(folder, num, how))
        return made[-1]

    yield make
    for each in made:
        each.close()
