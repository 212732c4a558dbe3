"""Table shards as processes of the driver's: started, looked after, and replaced."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.errors import ConfigError, ShoalError
from shoal.launch.fleet import Gone, Place
from shoal.shards.child import ShardProcess
from shoal.shards.order import Order
from shoal.training.folder import RunFolder

_MOST_FAILURES, _PAUSE_S = 5, 0.2
_START_S = 300.0
_SPARE_AFTER_S = 0.5


@dataclass
class _Shard:
    order: Order
    place: Place
    child: ShardProcess
    address: str = ""
    num_failures: int = 0
    """Since it last said where it listens."""


def num_shards(record: Mapping[str, Any]) -> int:
    """How many a run has."""
    return int((record["job"].get("strategy") or {}).get("shards", 0))


def _consistency(strategy: Mapping[str, Any]) -> str:
    """As a shard's order has it."""
    told = strategy.get("consistency") or {"kind": "Sync"}
    kind = str(told["kind"]).lower()
    return f"{kind}:{told['steps']}" if kind == "bounded" else kind


class ShardCrew:
    """The shards that a run's record asks for, on the fleet's places in turn.

    At each place a spare waits to replace one that ends there. Where none can be started any more, the next place has
    it, if another shard has a copy of what it kept.
    """

    def __init__(self, folder: RunFolder, record: Mapping[str, Any], places: Sequence[Place]) -> None:
        strategy: dict[str, Any] = record["job"]["strategy"]
        names = [f"s{number}" for number in range(num_shards(record))]
        self._folder = folder
        self._places = places
        self._silent_s = float(record["job"]["patience"]["silent_s"])
        self._has_copies = strategy["durability"] == "replica"
        self._shards: dict[str, _Shard] = {}
        self._spares: dict[Place, ShardProcess] = {}
        self._spares_from_s = 0.0
        there = len(list((folder.path / "shards").glob("s*")))
        if there not in (0, len(names)):
            raise ConfigError(
                f"the run's tables are in {there} shards, and strategy.shards is {len(names)}; say {there}"
            )
        try:
            for number, name in enumerate(names):
                place = places[number % len(places)]
                order = Order(
                    name=name, folder=str(folder.path / "shards" / name), shards=names,
                    consistency=_consistency(strategy),
                    num_lanes=record["job"]["num_lanes"], durability=strategy["durability"], host=place.address,
                    key_path=str(folder.key_path), log_path=str(folder.log_path(name)),
                )  # fmt: skip
                child = ShardProcess(order, place.words, folder.log_path(name))
                self._shards[name] = _Shard(order, place, child)
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> dict[str, str] | None:
        """Where they listen, once all of them do."""
        found = {name: shard.address for name, shard in self._shards.items()}
        return found if all(found.values()) else None

    def look(self) -> list[Gone]:
        """See to them: those that have ended since the last time, which are replaced. ``ShoalError`` for one that ends
        again and again before it listens."""
        gone, has_news = [], False
        for name, shard in self._shards.items():
            address = shard.child.look()
            if address and (shard.num_failures or not shard.address):
                shard.address, shard.num_failures, has_news = address, 0, True
            is_silent = shard.child.silent_s > (self._silent_s if address else _START_S)
            if is_silent:
                shard.child.kill()
            code = shard.child.exit_code
            if code is not None:
                how = f"killed by signal {-code}" if code < 0 else f"exited with {code}"
                gone.append(Gone(name, "was silent, and is killed" if is_silent else how))
                self._replace(name, shard)
        if self.addresses is not None and has_news and self._has_copies:
            for shard in self._shards.values():
                shard.child.tell(self.addresses)
        if self.addresses is not None and time.monotonic() > self._spares_from_s:
            self._keep_spares()
        return gone

    def _replace(self, name: str, shard: _Shard) -> None:
        shard.num_failures += 1
        if shard.num_failures >= _MOST_FAILURES:
            raise ShoalError(f"shard {name} does not start; {self._folder.log_path(name)} ends: {self._last(name)}")
        shard.child.ended()
        port = int(shard.address.rpartition(":")[2] or 0)
        if shard.num_failures > 1:
            time.sleep(_PAUSE_S)  # its port may be free then
        if shard.num_failures > 2 and self._has_copies:
            shard.place = self._places[(self._places.index(shard.place) + 1) % len(self._places)]
            port = 0
        order = msgspec.structs.replace(shard.order, host=shard.place.address, port=port)
        spare = self._spares.pop(shard.place, None)
        if spare is not None and spare.exit_code is None:
            spare.become(order)
            shard.child = spare
        else:
            shard.child = ShardProcess(order, shard.place.words, self._folder.log_path(name))
        self._spares_from_s = time.monotonic() + _SPARE_AFTER_S  # first the others have the machine

    def _keep_spares(self) -> None:
        for place in {shard.place for shard in self._shards.values()}:
            if place not in self._spares:
                self._spares[place] = ShardProcess(None, place.words, self._folder.log_path("spare"))

    def _last(self, name: str) -> str:
        lines = self._folder.log_path(name).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else "without a word"

    def close(self) -> None:
        """Let them end."""
        children = [*(shard.child for shard in self._shards.values()), *self._spares.values()]
        for child in children:
            child.release()
        for child in children:
            child.close()
