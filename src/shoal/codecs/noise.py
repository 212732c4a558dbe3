"""Random numbers that are a function of (key, counter) alone: the same bits on every machine and device.

The mixing function is lowbias32 (C. Wellons, Hash Prospector, 2018), applied twice, with half of the key before each.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
_LOW = 0xFFFFFFFF

Words = tuple[int, int]
"""A key as two integers of 32 bits."""


def words(key: int) -> Words:
    """Two well mixed integers of 32 bits from one of 64 (splitmix64: Steele et al. 2014)."""
    mask = 2**64 - 1
    z = (key + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return z & _LOW, z >> 32


def subkey(key: int, number: int) -> int:
    """Another key, for another purpose."""
    low, high = words(key ^ (number + 1) * 0xD1342543DE82EF95)
    return low | high << 32


def hash32(counters: Tensor, key_words: Words) -> Tensor:
    """Integers from 0 to 2**32 - 1, as int64, from counters (n,) int64 of that range."""
    return _mix(_mix(counters + key_words[0] & _LOW) + key_words[1] & _LOW)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * MULTIPLIER_1 & _LOW
    x = (x ^ (x >> 15)) * MULTIPLIER_2 & _LOW  # 64 bits wrap; the low 32 are right
    return x ^ (x >> 16)


def uniform(num_entries: int, key_words: Words, device: torch.device) -> Tensor:
    """(n,) float32 in [0, 1), multiples of 2**-24."""
    counters = torch.arange(num_entries, device=device)
    return (hash32(counters, key_words) >> 8).to(torch.float32) * 2.0**-24
