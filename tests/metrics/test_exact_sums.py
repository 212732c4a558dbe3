from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.metrics.exact import ExactSum

floats = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30)


@given(floats)
def test_a_sum_is_the_exact_one(values: list[float]) -> None:
    total = ExactSum.of(np.array(values, dtype=np.float64))
    assert Fraction(total.units, 2**1074) == sum(map(Fraction, values))


@given(floats, floats)
def test_sums_add_as_their_numbers_do(one: list[float], other: list[float]) -> None:
    both = ExactSum.of(np.array(one + other, dtype=np.float64))
    assert ExactSum.of(np.array(one, dtype=np.float64)) + ExactSum.of(np.array(other, dtype=np.float64)) == both


@given(floats)
def test_a_sum_comes_back_from_its_state(values: list[float]) -> None:
    total = ExactSum.of(np.array(values, dtype=np.float64))
    assert ExactSum.from_state(total.to_state()) == total


def test_a_million_numbers_add_up_as_fsum_says() -> None:
    values = np.random.default_rng(0).standard_normal(1_000_000)
    assert ExactSum.of(values).over(1) == math.fsum(values.tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_no_exact_sum(bad: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        ExactSum.of(np.array([1.0, bad]))


@pytest.mark.parametrize("state", ["", "p", "1p", "zp3", "1p-3", "1p99999", "1.5"])
def test_a_state_that_is_no_sum_is_refused(state: str) -> None:
    with pytest.raises(ValueError, match="1f3p1040"):
        ExactSum.from_state(state)
