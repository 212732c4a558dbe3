from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.lanes import Order, Part

orders = st.builds(
    Order,
    st.lists(st.integers(0, 12), max_size=9).map(tuple),
    st.integers(1, 9),
    st.integers(-(2**63), 2**63),
    st.integers(0, 3),
)

Row = tuple[int, int]


def rows_in(parts: list[Part]) -> list[Row]:
    return [(part.block, row) for part in parts for row in part.rows.tolist()]


def lane_of(order: Order, lane: int) -> list[Row]:
    return rows_in(order.slice(lane, 0, order.lane_size(lane)))


def test_this_order_never_changes() -> None:
    order = Order((3, 4, 0, 5), num_lanes=3, seed=7, epoch=1)
    assert [lane_of(order, lane) for lane in range(3)] == [
        [(1, 0), (1, 2), (1, 1), (1, 3)],
        [(3, 1), (0, 0), (0, 1), (0, 2)],
        [(3, 2), (3, 3), (3, 4), (3, 0)],
    ]


@given(orders)
def test_lanes_hold_every_row_once(order: Order) -> None:
    rows = [row for lane in range(order.num_lanes) for row in lane_of(order, lane)]
    assert sorted(rows) == [(block, row) for block, size in enumerate(order.block_sizes) for row in range(size)]


@given(orders)
def test_lanes_are_of_one_size_but_for_one_sample(order: Order) -> None:
    sizes = [order.lane_size(lane) for lane in range(order.num_lanes)]
    assert sum(sizes) == order.num_samples
    assert max(sizes) - min(sizes) <= 1


@given(orders, st.data())
def test_a_lane_is_the_same_in_slices_of_any_size(order: Order, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, order.num_lanes - 1))
    size = order.lane_size(lane)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, size), max_size=4))), size]
    slices = [order.slice(lane, start, stop) for start, stop in pairwise(cuts)]
    assert [row for parts in slices for row in rows_in(parts)] == lane_of(order, lane)


@given(orders, st.data())
def test_the_blocks_of_a_slice_are_told_without_permuting_rows(order: Order, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, order.num_lanes - 1))
    start = data.draw(st.integers(0, order.lane_size(lane)))
    stop = data.draw(st.integers(start, order.lane_size(lane)))
    (blocks,) = order.blocks_of(np.array([lane]), np.array([start]), np.array([stop]))
    assert "_rows" not in vars(order)
    assert blocks == [part.block for part in order.slice(lane, start, stop)]


@given(orders)
def test_neighbours_meet_in_the_block_that_they_share_at_the_same_end(order: Order) -> None:
    """Lanes 0 and 1 both end where they meet, 1 and 2 both begin there, and so on."""
    lanes = [[block for block, _ in lane_of(order, lane)] for lane in range(order.num_lanes)]
    for index, (left, right) in enumerate(pairwise(lanes)):
        end = 0 if index % 2 else -1
        shared = set(left) & set(right)
        assert not (left and right and shared) or shared == {left[end]} == {right[end]}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, *others = (lane_of(Order((50,) * 4, 1, seed, epoch), 0) for seed, epoch in [(0, 0), (0, 1), (1, 0)])
    assert all(sorted(other) == sorted(first) and other != first for other in others)


def test_rows_are_in_no_order_within_a_block_and_blocks_in_none_on_the_line() -> None:
    rows = lane_of(Order((100,) * 20, 1, seed=0, epoch=0), 0)
    blocks = [block for block, _ in rows[::100]]
    assert blocks != sorted(blocks)
    assert abs(np.corrcoef([row for _, row in rows[:100]], range(100))[0, 1]) < 0.5


@pytest.mark.parametrize(("lane", "start", "stop"), [(2, 0, 1), (-1, 0, 1), (0, 0, 6), (0, 3, 2), (0, -1, 2)])
def test_a_slice_beyond_a_lane_is_refused(lane: int, start: int, stop: int) -> None:
    with pytest.raises(ConfigError, match=f"lane {lane} of 2 yields no samples {start} to {stop}"):
        Order((10,), 2, seed=0, epoch=0).slice(lane, start, stop)


@pytest.mark.parametrize(("sizes", "num_lanes"), [((1,), 0), ((1, -1), 1)])
def test_an_order_that_cannot_be_is_refused(sizes: tuple[int, ...], num_lanes: int) -> None:
    with pytest.raises(ConfigError):
        Order(sizes, num_lanes, seed=0, epoch=0)
