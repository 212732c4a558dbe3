from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.lanes.hashing import key_of, mix, permutation

words = st.integers(0, 2**64 - 1)


def splitmix(word: int) -> int:
    """The slow obvious twin, on Python's integers."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_the_hash_is_the_published_one() -> None:
    assert mix(np.array([1234567], np.uint64)).tolist() == [6457827717110365317]


@given(st.lists(words, min_size=1))
def test_the_hash_equals_its_twin_on_python_integers(values: list[int]) -> None:
    assert mix(np.array(values, np.uint64)).tolist() == [splitmix(value) for value in values]


def test_these_permutations_never_change() -> None:
    assert permutation(10, 0).tolist() == [3, 5, 7, 4, 1, 2, 8, 9, 6, 0]
    assert permutation(10, key_of(7, 1)).tolist() == [7, 2, 6, 8, 0, 4, 9, 1, 3, 5]


def test_these_keys_never_change() -> None:
    assert key_of(1, 2, 3) == 15020427595393229491
    assert key_of(-1) == key_of(2**64 - 1) == 16490336266968443936


@given(st.integers(0, 500), words)
def test_a_permutation_orders_indices_by_their_hashes(size: int, key: int) -> None:
    assert permutation(size, key).tolist() == sorted(range(size), key=lambda index: splitmix(index ^ key))


@pytest.mark.parametrize("other", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0), (0, 0, 0, 0)])
def test_every_part_of_a_key_matters(other: tuple[int, ...]) -> None:
    assert key_of(0, 0, 0) != key_of(*other)
