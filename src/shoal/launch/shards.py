"""Table shards as processes of the driver's: started, looked after, and replaced at the same address."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shoal.errors import ConfigError, ShoalError
from shoal.launch.fleet import Gone, Place
from shoal.shards.order import Order
from shoal.training.folder import RunFolder

_MOST_FAILURES, _PAUSE_S = 5, 0.2
_START_S = 300.0


@dataclass
class _Shard:
    order: Order
    place: Place
    child: subprocess.Popen[bytes]
    address: str = ""
    started_s: float = field(default_factory=time.monotonic)
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
    """The shards that a run's record asks for, on the fleet's places in turn."""

    def __init__(self, folder: RunFolder, record: Mapping[str, Any], places: Sequence[Place]) -> None:
        strategy: dict[str, Any] = record["job"]["strategy"]
        names = [f"s{number}" for number in range(num_shards(record))]
        self._folder = folder
        self._shards: dict[str, _Shard] = {}
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
                    key_path=str(folder.key_path),
                )  # fmt: skip
                self._shards[name] = _Shard(order, place, self._start(order, place))
        except BaseException:
            self.close()
            raise

    def _start(self, order: Order, place: Place) -> subprocess.Popen[bytes]:
        words = [*place.words, sys.executable, "-m", "shoal.shards.process"]
        with self._folder.log_path(order.name).open("ab") as log:
            child = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        assert child.stdin is not None and child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        child.stdin.write(msgspec.json.encode(order) + b"\n")
        child.stdin.flush()
        return child

    @property
    def addresses(self) -> dict[str, str] | None:
        """Where they listen, once all of them do."""
        found = {name: shard.address for name, shard in self._shards.items()}
        return found if all(found.values()) else None

    def look(self) -> list[Gone]:
        """See to them: those that have ended since the last time, which are replaced. ``ShoalError`` for one that ends
        again and again before it listens."""
        gone = []
        for name, shard in self._shards.items():
            assert shard.child.stdout is not None
            line = shard.child.stdout.readline()
            if line:
                shard.address, shard.num_failures = msgspec.json.decode(line)["address"], 0
            code = shard.child.poll()
            if code is None and not shard.address and time.monotonic() - shard.started_s > _START_S:
                shard.child.kill()
                code = shard.child.wait()
            if code is None:
                continue
            gone.append(Gone(name, f"killed by signal {-code}" if code < 0 else f"exited with {code}"))
            shard.num_failures += 1
            if shard.num_failures >= _MOST_FAILURES:
                raise ShoalError(f"shard {name} does not start; {self._folder.log_path(name)} ends: {self._last(name)}")
            _end(shard.child)
            port = int(shard.address.rpartition(":")[2] or 0)
            if shard.num_failures > 1:
                time.sleep(_PAUSE_S)  # its port may be free then
            shard.child = self._start(msgspec.structs.replace(shard.order, port=port), shard.place)
            shard.started_s = time.monotonic()
        return gone

    def _last(self, name: str) -> str:
        lines = self._folder.log_path(name).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else "without a word"

    def close(self) -> None:
        """Let them end."""
        for shard in self._shards.values():
            assert shard.child.stdin is not None
            shard.child.stdin.close()
        for shard in self._shards.values():
            try:
                shard.child.wait(10)
            except subprocess.TimeoutExpired:
                shard.child.kill()
            _end(shard.child)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()
