"""Which loaded version a request goes to: the live one, or, for its share, a candidate. A swap is one assignment."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np

from shoal.errors import ConfigError
from shoal.rollout import Observed
from shoal.service.release import Release, Tally
from shoal.serving.answering import Answer, NotReady, Served, Unknown, failed
from shoal.serving.batching import Expired
from shoal.serving.datatypes import WHOLE, Array, Arrays

_REMEMBERED = 64
"""Of the newest requests, to be replayed at a gate; those with more than this many bytes are not."""
_MOST_BYTES = 1 << 20
_MOST_MIRRORED = 16
"""So many copies are under way at once at most."""
_CLOSE = 1e-3


class Switch:
    """A ``Service`` of several releases. A request that a candidate fails on is answered by the live one."""

    def __init__(self, seed: int | None = None) -> None:
        self.live: Release | None = None
        self.candidate: Release | None = None
        self.share = 0.0
        self.is_mirrored = False
        self.others: dict[int, Release] = {}
        """Loaded, and asked only by name."""
        self.recent: deque[Arrays] = deque(maxlen=_REMEMBERED)
        self._random = random.Random(seed)
        self._mirrored: set[asyncio.Task[None]] = set()

    def is_ready(self) -> bool:
        return self.live is not None and self.live.batcher.num_runners > 0

    def versions(self) -> Sequence[Served]:
        if self.live is None:
            return ()
        others = [*([self.candidate] if self.candidate else []), *self.others.values()]
        return (self.live.served, *(release.served for release in others if release is not self.live))

    def check_room(self, num_bytes: int = 0) -> None:
        if self.live is not None:
            self.live.batcher.check_room(num_bytes)

    def ask(self, inputs: Arrays, timeout_s: float, version: int | None = None) -> asyncio.Future[Answer]:
        if version is not None:
            return self._ask_one(version, inputs, timeout_s)
        if self.live is not None and (self.candidate is None or not (self.share or self.is_mirrored)):
            return self._ask_live(self.live, inputs, timeout_s)
        return asyncio.create_task(self._ask_some(inputs, timeout_s))

    def _ask_one(self, version: int, inputs: Arrays, timeout_s: float) -> asyncio.Future[Answer]:
        for release in (self.live, self.candidate, *self.others.values()):
            if release is not None and release.version == version:
                return release.ask(inputs, timeout_s)
        return failed(Unknown(f"version {version} is not served"))

    async def _ask_some(self, inputs: Arrays, timeout_s: float) -> Answer:
        """The candidate, for its share; and the live version."""
        live, candidate, refusal = self.live, self.candidate, None
        if candidate is not None and self.share and self._random.random() < self.share:
            answer, refusal = await _tried(candidate, inputs, timeout_s)
            if answer is not None:
                return answer
        if live is None:
            raise NotReady("no version is served yet: ask again later")
        answer = await self._ask_live(live, inputs, timeout_s)
        if candidate is not None and refusal is not None:
            candidate.tally.failed(refusal)
        if self.is_mirrored and self.candidate is not None and len(self._mirrored) < _MOST_MIRRORED:
            task = asyncio.create_task(self._mirror(self.candidate, inputs, answer.outputs, timeout_s))
            self._mirrored.add(task)
            task.add_done_callback(self._mirrored.discard)
        return answer

    def _ask_live(self, live: Release, inputs: Arrays, timeout_s: float) -> asyncio.Future[Answer]:
        return live.ask(inputs, timeout_s, self._remember)

    def _remember(self, inputs: Arrays) -> None:
        if sum(array.nbytes for array in inputs.values()) <= _MOST_BYTES:
            self.recent.append(inputs)

    async def _mirror(self, candidate: Release, inputs: Arrays, expected: Arrays, timeout_s: float) -> None:
        answer, refusal = await _tried(candidate, inputs, timeout_s)
        if refusal is not None:  # of what the live version has answered
            candidate.tally.failed(refusal)
        elif answer is not None and not same(answer.outputs, expected):
            candidate.tally.num_differing += 1


async def _tried(candidate: Release, inputs: Arrays, timeout_s: float) -> tuple[Answer | None, ConfigError | None]:
    """What a candidate answers, or has to say against the request, of which the live version may say the same. That it
    comes too late counts against it, as its failures do, which its release has counted; but not that it has no room."""
    try:
        return await candidate.ask(inputs, timeout_s), None
    except ConfigError as error:
        return None, error
    except Expired as error:
        candidate.tally.failed(error)
        return None, None
    except Exception:  # noqa: BLE001 - the live version answers instead
        return None, None


def same(found: Arrays, expected: Arrays) -> bool:
    """Whether two answers say the same: whole numbers exactly, others within a thousandth."""
    return found.keys() == expected.keys() and all(_is_same(found[name], expected[name]) for name in found)


def _is_same(found: Array, expected: Array) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.dtype.kind in WHOLE:
        return np.array_equal(found, expected)
    one, other = found.astype(np.float64), expected.astype(np.float64)
    return np.allclose(one, other, rtol=_CLOSE, atol=_CLOSE, equal_nan=True)


def observed(tally: Tally) -> Observed:
    """A tally, as the roll-out looks at it."""
    p50_s = statistics.median(tally.took_s) if tally.took_s else 0.0
    return Observed(tally.num, tally.num_failed, tally.num_differing, p50_s, tally.reason)
