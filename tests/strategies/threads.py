"""Ranks in threads: a group whose collectives are done in memory, in the order of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoal.comm.collectives import Seat


class _Table:
    """Where the ranks lay their tensors down; the last to come to a place lays them together."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.changed = threading.Condition()
        self.laid: dict[int, dict[int, Tensor]] = {}
        self.whole: dict[int, Tensor] = {}

    def lay(self, place: int, rank: int, tensor: Tensor) -> None:
        with self.changed:
            there = self.laid.setdefault(place, {})
            there[rank] = tensor.clone()
            if len(there) == self.world_size:
                shapes = {(t.shape, t.dtype) for t in there.values()}
                assert len(shapes) == 1, f"the ranks' collectives differ: {shapes}"
                self.whole[place] = torch.stack([there[r] for r in range(self.world_size)])
                self.changed.notify_all()

    def pick_up(self, place: int) -> Tensor:
        with self.changed:
            assert self.changed.wait_for(lambda: place in self.whole, timeout=30)
            return self.whole[place]


class ThreadGroup:
    """One rank's side. Notes the sizes of what it sends, in order."""

    def __init__(self, table: _Table, rank: int) -> None:
        self.seat = Seat(1, rank, table.world_size)
        self.sent: list[int] = []
        self._table = table

    def check(self) -> None:
        """No thread halts this group."""

    def all_reduce(self, tensor: Tensor) -> Any:
        place = self._lay(tensor)
        return _Work(lambda: tensor.copy_(self._table.pick_up(place).sum(0, dtype=tensor.dtype)))

    def all_to_all(self, received: Tensor, rows: Tensor) -> Any:
        place = self._lay(rows)
        return _Work(lambda: received.copy_(self._table.pick_up(place)[:, self.seat.rank]))

    def all_gather_rows(self, received: Tensor, row: Tensor) -> Any:
        place = self._lay(row)
        return _Work(lambda: received.copy_(self._table.pick_up(place)))

    def _lay(self, tensor: Tensor) -> int:
        place = len(self.sent)
        self.sent.append(tensor.numel())
        self._table.lay(place, self.seat.rank, tensor)
        return place


class _Work:
    def __init__(self, wait: Callable[[], object]) -> None:
        self.wait = wait


def on_ranks(world_size: int, act: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What ``act`` returns on every rank."""
    table = _Table(world_size)
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        results[rank] = act(ThreadGroup(table, rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world_size)]
