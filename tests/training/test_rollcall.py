"""What the members of a group find out from the sum of what each says."""

from __future__ import annotations

import pytest

from shoal.lanes import Ledger
from shoal.training.rollcall import NUM_ENTRIES, Call, decode, encode

QUIET = Call(Ledger(), 0.0, False, 0)


def summed(*calls):
    return decode(sum(encode(call) for call in calls))


@pytest.mark.parametrize(
    ("orders", "agreed", "some"),
    [((0, 0, 0), 0, False), ((7, 7, 7), 7, True), ((0, 7, 7), 0, True), ((7, 7, 8), 0, True), ((5,), 5, True)],
)
def test_an_order_is_obeyed_once_all_hold_it(orders, agreed, some):
    roll = summed(*(Call(Ledger(), 0.0, False, order) for order in orders))
    assert (roll.order, roll.some_ordered, roll.num_present) == (agreed, some, len(orders))


def test_samples_losses_and_complaints_add_up():
    calls = [Call(Ledger(3, 1 << 63), 1.5, False, 0), Call(Ledger(4, 1 << 63 | 9), 2.0, True, 0, due=True)]
    roll = summed(*calls)
    assert roll.ledger == calls[0].ledger + calls[1].ledger
    assert (roll.loss_sum, roll.num_bad, roll.due) == (3.5, 1, True)


@pytest.mark.parametrize(
    ("prints", "differ"),
    [(("", "", ""), False), (("ab" * 8, "", "ab" * 8), False), (("ab" * 8, "ab" * 7 + "ac"), True)],
)
def test_fingerprints_are_compared_among_those_that_have_one(prints, differ):
    calls = [Call(Ledger(), 0.0, False, 0, text) for text in prints]
    assert summed(*calls).fingerprints_differ is differ


def test_a_call_has_as_many_entries_as_said():
    assert len(encode(QUIET)) == NUM_ENTRIES
