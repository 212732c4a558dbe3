"""An account of samples that can be added up in any order and compared: how many, and which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shoal.lanes.hashing import Indices, Words, mix
from shoal.lanes.steps import Span

_WORD = 1 << 64
_LANE = np.uint64(0xD6E8FEB86659FD93)
_EPOCH = 0xA0761D6478BD642F


@dataclass(frozen=True)
class Ledger:
    """``count`` samples whose hashes of (epoch, lane, position) sum to ``checksum`` modulo 2^64.

    Two ledgers that agree tell of the same samples, each as often, but for a chance of about 2^-64.
    """

    count: int = 0
    checksum: int = 0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(self.count + other.count, (self.checksum + other.checksum) % _WORD)

    @staticmethod
    def of(epoch: int, lane: int, start: int, stop: int) -> Ledger:
        """The samples from ``start`` up to ``stop`` of a lane in an epoch."""
        return Ledger.of_hashes(sample_hashes(epoch, np.asarray([lane]), np.asarray([start]), np.asarray([stop])))

    @staticmethod
    def of_hashes(hashes: Words) -> Ledger:
        """The samples with these hashes, of ``sample_hashes``."""
        return Ledger(len(hashes), int(hashes.sum(dtype=np.uint64)))

    @staticmethod
    def expected(span: Span, lanes: Iterable[int] | None = None) -> Ledger:
        """What a step must come to, over all lanes or over these."""
        chosen = np.arange(len(span.starts)) if lanes is None else np.asarray(list(lanes), np.int64)
        return Ledger.of_hashes(sample_hashes(span.epoch, chosen, span.starts[chosen], span.stops[chosen]))


def sample_hashes(epoch: int, lanes: Indices, starts: Indices, stops: Indices) -> Words:
    """A hash for each sample from ``starts`` up to ``stops`` of these lanes, lane by lane."""
    counts = stops - starts
    before = np.cumsum(counts) - counts
    positions = np.arange(counts.sum()) + np.repeat(starts - before, counts)
    of_lane = mix(lanes.astype(np.uint64) * _LANE ^ np.uint64(epoch * _EPOCH % _WORD))
    return mix(np.repeat(of_lane, counts) ^ positions.astype(np.uint64))
