from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shoal.errors import Bug, ConfigError
from shoal.lanes import deal

Deal = Mapping[str, tuple[int, ...]]

names = st.sampled_from("abcdef")
weights = st.dictionaries(names, st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 3.5]), min_size=1)


@st.composite
def deals(draw: st.DrawFn, num_lanes: int) -> dict[str, tuple[int, ...]]:
    """Any deal of some of the lanes, such as any history may leave."""
    owners = draw(st.lists(st.one_of(st.none(), names), min_size=num_lanes, max_size=num_lanes))
    return {name: tuple(lane for lane, owner in enumerate(owners) if owner == name) for name in "abcdef"}


def num_moved(before: Deal, after: Deal) -> int:
    """Lanes that a worker had and lost, though it is still there."""
    return sum(len(set(before.get(name, ())) - set(lanes)) for name, lanes in after.items())


@given(st.integers(0, 40), weights, st.data())
def test_every_lane_is_dealt_to_one_worker(num_lanes: int, shares: dict[str, float], data: st.DataObject) -> None:
    assume(any(shares.values()))
    dealt = deal(num_lanes, shares, data.draw(deals(num_lanes)))
    assert sorted(lane for lanes in dealt.values() for lane in lanes) == list(range(num_lanes))
    assert all(list(lanes) == sorted(lanes) for lanes in dealt.values())
    assert list(dealt) == list(shares)


@given(st.integers(0, 40), weights, st.data())
def test_shares_are_in_proportion_to_within_a_lane(
    num_lanes: int, shares: dict[str, float], data: st.DataObject
) -> None:
    assume(any(shares.values()))
    dealt = deal(num_lanes, shares, data.draw(deals(num_lanes)))
    for name, weight in shares.items():
        assert abs(len(dealt[name]) - num_lanes * weight / sum(shares.values())) < 1
        assert weight or not dealt[name]


@given(st.integers(0, 12), st.sets(names, min_size=1, max_size=4), st.data())
def test_equal_workers_move_as_few_lanes_as_any_even_deal(
    num_lanes: int, members: set[str], data: st.DataObject
) -> None:
    before = data.draw(deals(num_lanes))
    after = deal(num_lanes, dict.fromkeys(sorted(members), 1.0), before)
    least, more = divmod(num_lanes, len(members))
    even = (counts for counts in product((0, 1), repeat=len(members)) if sum(counts) == more)
    fewest = min(
        sum(max(0, len(before[name]) - least - extra) for name, extra in zip(sorted(members), counts, strict=True))
        for counts in even
    )
    assert num_moved(before, after) == fewest


@given(st.integers(1, 40), weights, st.data())
def test_a_deal_that_stands_is_left_alone(num_lanes: int, shares: dict[str, float], data: st.DataObject) -> None:
    assume(any(shares.values()))
    dealt = deal(num_lanes, shares, data.draw(deals(num_lanes)))
    assert deal(num_lanes, shares, dealt) == dealt


def test_a_fresh_deal_is_runs_of_neighbours() -> None:
    assert deal(8, {"a": 1, "b": 1, "c": 2}) == {"a": (0, 1), "b": (2, 3), "c": (4, 5, 6, 7)}


def test_the_lanes_of_who_is_gone_go_to_those_who_stay() -> None:
    assert deal(6, {"a": 1, "c": 1}, {"a": (0, 1), "b": (2, 3), "c": (4, 5)}) == {"a": (0, 1, 2), "c": (3, 4, 5)}


def test_a_newcomer_is_given_its_share_and_nothing_else_moves() -> None:
    before = {"a": (0, 1, 2), "b": (3, 4, 5)}
    after = deal(6, {"a": 1, "b": 1, "c": 1}, before)
    assert after == {"a": (0, 1), "b": (3, 4), "c": (2, 5)}


def test_lanes_that_are_to_be_spread_go_to_a_newcomer_as_others_do() -> None:
    before = {"a": (0, 1, 2, 3, 8, 9), "b": (4, 5, 6, 7, 10, 11)}
    assert deal(12, {"a": 1, "b": 1, "new": 1}, before, spread=(8, 9, 10, 11)) == {
        "a": (0, 1, 2, 8), "b": (4, 5, 6, 10), "new": (3, 7, 9, 11),
    }  # fmt: skip


@given(st.integers(1, 40), weights, st.data())
def test_a_worker_gives_up_of_the_lanes_that_are_to_be_spread_as_of_all(
    num_lanes: int, shares: dict[str, float], data: st.DataObject
) -> None:
    assume(any(shares.values()))
    before = data.draw(deals(num_lanes))
    spread = data.draw(st.sets(st.sampled_from(range(num_lanes))))
    after = deal(num_lanes, shares, before, spread)
    assert num_moved(before, after) == num_moved(before, deal(num_lanes, shares, before))
    for name, lanes in after.items():
        kept = set(lanes) & set(before[name])
        if before[name]:
            part = len(kept) / len(before[name])
            assert abs(len(kept & spread) - part * len(set(before[name]) & spread)) <= 0.5


def test_the_lane_left_over_stays_with_who_has_it() -> None:
    assert deal(3, {"a": 1, "b": 1}, {"a": (0,), "b": (1, 2)}) == {"a": (0,), "b": (1, 2)}


def test_a_weight_of_nothing_gets_nothing() -> None:
    assert deal(4, {"a": 0, "b": 1}, {"a": (0, 1), "b": (2, 3)}) == {"a": (), "b": (0, 1, 2, 3)}


def test_weights_may_be_of_any_size() -> None:
    assert deal(4, {"a": 1.7e308, "b": 1.7e308}) == {"a": (0, 1), "b": (2, 3)}
    assert deal(4, {"a": 5e-324, "b": 5e-324}) == {"a": (0, 1), "b": (2, 3)}


@pytest.mark.parametrize("shares", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_weights_that_divide_nothing_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        deal(4, shares)


@pytest.mark.parametrize("before", [{"a": (0, 0)}, {"a": (0,), "b": (0,)}, {"a": (4,)}, {"a": (-1,)}])
def test_a_previous_deal_that_was_none_is_a_bug(before: Deal) -> None:
    with pytest.raises(Bug, match="each of 4 lanes was to be dealt once"):
        deal(4, {"a": 1, "b": 1}, before)
