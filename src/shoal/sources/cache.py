"""Blocks that are read in the background, once each while they are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from shoal.sources.columns import Columns

_THREADS = 2


class BlockCache:
    """Keeps the blocks that are held, and as many bytes of others as there is room for: those last used.

    ``read`` is called in two threads, for one block at a time each. A block that could not be read is forgotten, so
    that whoever asks again has it tried again.
    """

    def __init__(self, read: Callable[[int], Columns], room_bytes: int) -> None:
        self._read = read
        self._room_bytes = room_bytes
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="shoal-blocks")
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[Columns]] = OrderedDict()
        self._here: dict[int, Columns] = {}
        self._total_bytes = 0
        self._held: set[int] = set()

    def get(self, blocks: Iterable[int]) -> dict[int, Columns]:
        """These blocks, once they are all here."""
        with self._lock:
            futures = {block: self._ask(block) for block in blocks}
            found = {block: self._here[block] for block in futures if block in self._here}
        if len(found) < len(futures):
            found = {block: future.result() for block, future in futures.items()}
        return found

    def hold(self, blocks: Collection[int]) -> None:
        """Begin to read these, and keep them until they are released."""
        with self._lock:
            self._held.update(blocks)
            for block in blocks:
                self._ask(block)

    def release(self, blocks: Collection[int]) -> None:
        with self._lock:
            self._held.difference_update(blocks)
            self._make_room()

    def close(self) -> None:
        """Ends once what is being read has been."""
        self._pool.shutdown(cancel_futures=True)
        self._blocks.clear()
        self._here.clear()

    def _ask(self, block: int) -> Future[Columns]:
        future = self._blocks.get(block)
        if future is None:
            future = self._blocks[block] = self._pool.submit(self._fetch, block)
        self._blocks.move_to_end(block)
        return future

    def _fetch(self, block: int) -> Columns:
        try:
            columns = self._read(block)
        except BaseException:
            with self._lock:
                self._blocks.pop(block, None)
            raise
        with self._lock:
            self._here[block] = columns
            self._total_bytes += columns.num_bytes
            self._make_room()
        return columns

    def _make_room(self) -> None:
        for block in list(self._blocks) if self._total_bytes > self._room_bytes else ():
            if self._total_bytes <= self._room_bytes:
                return
            if block in self._here and block not in self._held:
                del self._blocks[block]
                self._total_bytes -= self._here.pop(block).num_bytes
