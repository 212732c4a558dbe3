"""A service in this process's event loop, with real processes of models that need no run."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.errors import ConfigError
from shoal.rollout import Policy, Threshold
from shoal.service.conductor import Conductor, Plan
from shoal.service.release import Pool
from shoal.service.replica import Loading
from shoal.service.switch import Switch
from shoal.service.wire import Source
from shoal.serving.answering import Answer

LOADING = Loading(command=[sys.executable, "-m", "tests.service.model_process"], most_s=60.0)
QUICK = Policy(shadow_requests=0, canary_shares=(), stage_s=60.0)


@dataclass
class Shelf:
    """Versions by what they are: see ``model_process``. ``faults`` are raised where one is asked for,
    ``trouble`` where the newest is."""

    kinds: dict[int, str] = field(default_factory=dict)
    faults: dict[int, Exception] = field(default_factory=dict)
    trouble: Exception | None = None

    def newest(self) -> int | None:
        if self.trouble is not None:
            raise self.trouble
        return max(self.kinds, default=None)

    def steps(self) -> Sequence[int]:
        return sorted(self.kinds)

    def source(self, version: int) -> Source:
        if version not in self.kinds:
            raise ConfigError(f"version {version} is not stored")
        if version in self.faults:
            raise self.faults[version]
        return Source(self.kinds[version], version)


@dataclass
class Serviced:
    """A conductor, its switch, and what it noted."""

    shelf: Shelf
    switch: Switch
    conductor: Conductor
    events: list[dict[str, Any]]

    async def ask(self, number: float = 1.0, timeout_s: float = 60.0, version: int | None = None) -> Answer:
        return await self.switch.ask({"number": np.array([number], np.float32)}, timeout_s, version)

    async def until(self, kind: str, version: int | None = None) -> dict[str, Any]:
        """The event, once it has happened."""
        while True:
            for event in self.events:
                if event["kind"] == kind and version in (None, event["version"]):
                    return event
            await asyncio.sleep(0.01)

    def store(self, version: int, kind: str = "good") -> None:
        self.shelf.kinds[version] = kind


@dataclass
class Heard:
    """A witness that remembers."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def note(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def batch(self, num_samples: int, took_s: float) -> None:
        assert num_samples > 0 and took_s >= 0


@asynccontextmanager
async def serviced(
    kinds: dict[int, str], policy: Policy = QUICK, num_replicas: int = 1, follows: bool = True,
    loading: Loading = LOADING,
) -> AsyncIterator[Serviced]:  # fmt: skip
    """Within this the service runs, and has started."""
    shelf, switch, events = Shelf(dict(kinds)), Switch(seed=1), list[dict[str, Any]]()
    pool = Pool(loading, num_replicas)
    plan = Plan(num_replicas=num_replicas, policy=policy, follows=follows, poll_s=0.01)

    conductor = Conductor(shelf, switch, pool, plan, Heard(events))
    running = asyncio.create_task(conductor.run())
    try:
        await conductor.start()
        yield Serviced(shelf, switch, conductor, events)
    finally:
        running.cancel()
        await conductor.close()


def is_there(pid: int) -> bool:
    """Whether a process is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run(test: Callable[[], Awaitable[None]]) -> None:
    """A test that waits for things, within two minutes."""
    asyncio.run(asyncio.wait_for(test(), 120))


ACCURATE = Threshold("accuracy", "at_least", -0.01, is_relative=True)
