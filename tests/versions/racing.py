"""Processes that race to create the same names. Imports nothing heavy: every racer imports it anew."""

from __future__ import annotations

import multiprocessing
from typing import Any

from shoal.versions.store import Exists, Store

_SOON_S = 120.0


def winners(url: str, num_racers: int, num_names: int) -> list[tuple[int, bytes]]:
    """Who, by its data, created each ``g/NUMBER`` in the store; sorted."""
    context = multiprocessing.get_context("spawn")
    ready, wins = context.Barrier(num_racers), context.Queue()
    racers = [
        context.Process(target=_race, args=(url, num_names, str(racer).encode(), ready, wins))
        for racer in range(num_racers)
    ]
    for racer in racers:
        racer.start()
    won = [pair for _ in racers for pair in wins.get(timeout=_SOON_S)]
    for racer in racers:
        racer.join(_SOON_S)
    return sorted(won)


def _race(url: str, num_names: int, data: bytes, ready: Any, wins: Any) -> None:
    store, won = Store(url), []
    store.list("g")
    ready.wait()
    for number in range(num_names):
        try:
            store.create(f"g/{number}", data)
        except Exists:
            continue
        won.append((number, data))
    wins.put(won)
