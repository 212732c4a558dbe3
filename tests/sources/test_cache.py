from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shoal.sources.cache import BlockCache
from shoal.sources.columns import Columns

TIMEOUT_S = 30
BLOCK_BYTES = 80


class Disk:
    """Blocks of 80 bytes, and an account of which were read."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.gates: dict[int, threading.Event] = {}
        self.errors: dict[int, BaseException] = {}

    def read(self, block: int) -> Columns:
        self.reads.append(block)
        if block in self.gates:
            assert self.gates[block].wait(TIMEOUT_S)
        if block in self.errors:
            raise self.errors.pop(block)
        return Columns.of((torch.full((10,), block),))


Open = Callable[..., BlockCache]


@pytest.fixture(name="disk")
def _disk() -> Disk:
    return Disk()


@pytest.fixture(name="open_cache")
def _open_cache(disk: Disk) -> Iterator[Open]:
    caches: list[BlockCache] = []

    def opened(num_blocks: float) -> BlockCache:
        caches.append(BlockCache(disk.read, int(num_blocks * BLOCK_BYTES)))
        return caches[-1]

    yield opened
    for cache in caches:
        cache.close()


def values(found: dict[int, Columns]) -> dict[int, Any]:
    return {block: columns.arrays[0][0] for block, columns in found.items()}


def test_what_there_is_room_for_is_read_once(disk: Disk, open_cache: Open) -> None:
    cache = open_cache(3)
    for _ in range(2):
        assert values(cache.get([2, 0, 1])) == {2: 2, 0: 0, 1: 1}
    assert sorted(disk.reads) == [0, 1, 2]


def test_the_longest_unused_goes_first(disk: Disk, open_cache: Open) -> None:
    cache = open_cache(2)
    for block in (0, 1, 0, 2):
        cache.get([block])
    disk.reads.clear()
    cache.get([0])
    cache.get([2])
    assert not disk.reads
    cache.get([1])
    assert disk.reads == [1]


def test_what_is_held_stays_though_there_is_no_room(disk: Disk, open_cache: Open) -> None:
    cache = open_cache(0)
    cache.hold([0, 1, 2])
    for _ in range(3):
        cache.get([0, 1, 2])
    assert sorted(disk.reads) == [0, 1, 2]


def test_what_is_released_goes_when_there_is_no_room(disk: Disk, open_cache: Open) -> None:
    cache = open_cache(1)
    cache.hold([0, 1, 2])
    cache.get([0, 1, 2])
    cache.release([0, 1, 2])
    assert list(cache._blocks) == [2]


def test_more_can_be_asked_for_at_once_than_there_is_room_for(disk: Disk, open_cache: Open) -> None:
    cache = open_cache(1.5)
    assert values(cache.get(range(10))) == {block: block for block in range(10)}
    assert len(cache._blocks) == 1


def test_what_is_being_read_is_not_read_again(disk: Disk, open_cache: Open) -> None:
    cache = open_cache(0)
    disk.gates[0] = threading.Event()
    cache.hold([0])
    found: list[dict[int, Columns]] = []
    asking = [threading.Thread(target=lambda: found.append(cache.get([0]))) for _ in range(3)]
    for thread in asking:
        thread.start()
    disk.gates[0].set()
    for thread in asking:
        thread.join(TIMEOUT_S)
    assert len(found) == 3
    assert disk.reads == [0]


def test_what_is_released_before_it_is_read_is_not_kept(disk: Disk, open_cache: Open) -> None:
    cache = open_cache(0)
    disk.gates[0] = threading.Event()
    cache.hold([0])
    cache.release([0])
    disk.gates[0].set()
    cache.get([1])
    cache.close()
    assert not cache._blocks
    assert cache._total_bytes == 0


def test_an_error_goes_to_who_asked_and_is_not_kept(disk: Disk, open_cache: Open) -> None:
    cache = open_cache(3)
    disk.errors[1] = OSError("a bad sector")
    with pytest.raises(OSError, match="a bad sector"):
        cache.get([0, 1])
    assert values(cache.get([0, 1])) == {0: 0, 1: 1}
    assert sorted(disk.reads) == [0, 1, 1]
