from __future__ import annotations

from functools import reduce
from operator import add

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.lanes import Ledger, Steps, deal

plans = st.builds(Steps, st.integers(1, 200), st.integers(1, 50), st.integers(1, 9), epochs=st.integers(1, 2))


def test_this_ledger_never_changes() -> None:
    assert Ledger.of(epoch=1, lane=2, start=3, stop=7) == Ledger(4, 3206959831839728422)


@given(plans, st.data())
def test_what_workers_took_adds_up_to_the_step_in_any_order(steps: Steps, data: st.DataObject) -> None:
    span = steps.span(data.draw(st.integers(0, steps.total_steps - 1)))
    lanes = data.draw(st.permutations(range(steps.num_lanes)))
    taken = [Ledger.of(span.epoch, lane, int(span.starts[lane]), int(span.stops[lane])) for lane in lanes]
    assert reduce(add, taken) == Ledger.expected(span)
    assert Ledger.expected(span).count == span.num_samples


@given(plans, st.integers(1, 5))
def test_the_shares_of_a_deal_add_up_to_the_step(steps: Steps, num_workers: int) -> None:
    span = steps.span(0)
    dealt = deal(steps.num_lanes, {str(worker): 1.0 for worker in range(num_workers)})
    shares = [Ledger.expected(span, lanes) for lanes in dealt.values()]
    assert reduce(add, shares) == Ledger.expected(span)


@pytest.mark.parametrize(
    "other",
    [
        Ledger.of(0, 0, 0, 3),
        Ledger.of(0, 0, 1, 5),
        Ledger.of(0, 1, 0, 4),
        Ledger.of(1, 0, 0, 4),
        Ledger.of(0, 0, 0, 2) + Ledger.of(0, 0, 0, 2),
        Ledger.of(0, 0, 0, 3) + Ledger.of(0, 3, 0, 1),
    ],
    ids=["one lost", "one lost and one too many", "another lane", "another epoch", "repeated", "lane for position"],
)
def test_ledgers_of_other_samples_differ(other: Ledger) -> None:
    assert other != Ledger.of(0, 0, 0, 4)


def test_nothing_adds_nothing() -> None:
    assert Ledger.of(3, 4, 5, 9) + Ledger() == Ledger.of(3, 4, 5, 9)
    assert Ledger.of(3, 4, 5, 5) == Ledger()
