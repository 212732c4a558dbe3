from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.membership import NOTHING, Origin, Standing
from shoal.membership.choice import choose_base, drop_unreachable

names = st.sampled_from([f"w{i}" for i in range(6)])
standings = st.one_of(st.just(NOTHING), st.builds(Standing, st.integers(0, 4), st.just("x")))
pools = st.dictionaries(names, standings)
misses = st.dictionaries(names, st.frozensets(names, max_size=3))


def test_a_fresh_process_has_no_say():
    pool = {"a": NOTHING, "b": NOTHING, "c": Standing(3, "x")}
    assert choose_base(["a", "b", "c"], pool, NOTHING) == (Standing(3, "x"), Origin.PEERS)


def test_what_most_members_hold_wins_and_then_the_lowest_rank():
    pool = {"a": Standing(3, "x"), "b": Standing(3, "y"), "c": Standing(3, "y"), "d": Standing(2, "z")}
    assert choose_base(list("abcd"), pool, NOTHING)[0] == Standing(3, "y")
    assert choose_base(list("abd"), pool, NOTHING)[0] == Standing(3, "x")


def test_the_store_wins_only_over_what_is_older():
    pool = {"a": Standing(3, "x")}
    assert choose_base(["a"], pool, Standing(4, "s")) == (Standing(4, "s"), Origin.STORE)
    assert choose_base(["a"], pool, Standing(3, "x")) == (Standing(3, "x"), Origin.PEERS)


def test_the_one_that_misses_most_is_left_out():
    pool = {w: Standing(3, "x") for w in "abcd"}
    cut = {"d": frozenset("abc"), "a": frozenset("d")}
    assert drop_unreachable(pool, cut, 4) == (["a", "b", "c"], ["d"])


def test_a_newcomer_that_is_cut_off_waits():
    pool = {"a": Standing(3, "x"), "b": NOTHING}
    assert drop_unreachable(pool, {"b": frozenset("a")}, 4) == (["a"], [])


@given(pools, misses, st.integers(1, 6))
def test_who_stays_can_reach_each_other_and_holds_the_newest_version_there_is(pool, cut, most):
    staying, cut_off = drop_unreachable(pool, cut, most)
    assert len(staying) <= most and not set(staying) & set(cut_off) and set(staying) | set(cut_off) <= set(pool)
    assert not any(b in cut.get(a, ()) for a in staying for b in staying if a != b)
    left = set(pool) - set(staying) - set(cut_off)
    newest = max((pool[w].step for w in staying), default=-1)
    reachable = {w for w in left if not any(w in cut.get(o, ()) or o in cut.get(w, ()) for o in pool)}
    assert all(pool[w].step <= newest for w in reachable)
