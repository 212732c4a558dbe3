"""A counter-based hash: the same numbers on every machine, with every library version, in any order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def mix(words: Words) -> Words:
    """SplitMix64's output function (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    words = words + _GAMMA
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))


def key_of(*parts: int) -> int:
    """One 64-bit key from several integers."""
    key = 0
    for part in parts:
        key = _mixed(key ^ (part & _MASK))
    return key


def _mixed(word: int) -> int:
    """``mix`` of one word, without an array's cost."""
    word = (word + int(_GAMMA)) & _MASK
    word = ((word ^ (word >> 30)) * int(_FIRST)) & _MASK
    word = ((word ^ (word >> 27)) * int(_SECOND)) & _MASK
    return word ^ (word >> 31)


def permutation(size: int, key: int) -> Indices:
    """A permutation of ``range(size)``: the order of the hashes of (key, index), of which no two are equal."""
    hashes = mix(np.arange(size, dtype=np.uint64) ^ np.uint64(key))
    return np.argsort(hashes).astype(np.int64, copy=False)
