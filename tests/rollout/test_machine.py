"""What is decided of versions, without one being loaded."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from shoal.errors import ConfigError
from shoal.rollout import Check, Observed, Policy, State, begin, parse_threshold, step
from shoal.rollout.machine import (
    Action,
    Deny,
    Found,
    Gate,
    Gated,
    Load,
    Loaded,
    LoadFailed,
    Looked,
    Mirror,
    Note,
    Promote,
    PromoteAsked,
    Retire,
    RollbackAsked,
    Share,
    Stage,
)  # fmt: skip

GOOD, BAD = Check("accuracy", True, "0.9"), Check("accuracy", False, "0.5 where >= 0.9 is needed")
FAST, SLOW = Observed(100, p50_s=0.001), Observed(100, p50_s=0.1)
BROKEN = Observed(100, num_failed=50, p50_s=0.001, reason="ValueError: no")
NOTHING = Observed()


def led(state: State, *events: object, now_s: float = 0.0) -> tuple[State, list[Action]]:
    """The last event's actions."""
    actions: list[Action] = []
    for event in events:
        state, actions = step(state, event, now_s)  # type: ignore[arg-type]
    return state, actions


def kinds(actions: list[Action]) -> list[str]:
    return [action.kind if isinstance(action, Note) else type(action).__name__ for action in actions]


@pytest.fixture(name="live")
def _live() -> State:
    """Version 1 is live."""
    state, _ = led(begin(Policy(canary_shares=(0.1, 0.5))), Found(1), Loaded(1), Gated(1, (GOOD,)))
    assert state.live == 1
    return state


def at(state: State, stage: Stage, level: int = 0) -> State:
    """Version 2 is a candidate there."""
    state, _ = led(state, Found(2))
    assert state.candidate is not None
    return replace(state, candidate=replace(state.candidate, stage=stage, level=level))


def test_the_first_is_gated_and_then_live_for_there_is_nobody_to_shadow():
    state, actions = led(begin(), Found(1))
    assert actions[0] == Load(1)
    state, actions = led(state, Loaded(1))
    assert actions == [Gate(1)]
    state, actions = led(state, Gated(1, (GOOD,)))
    assert kinds(actions) == ["gate_passed", "Promote", "promoted"] and state.live == 1


def test_the_next_is_shadowed_then_answers_a_growing_share_then_all(live: State):
    state, actions = led(live, Found(2), Loaded(2), Gated(2, (GOOD,)))
    assert kinds(actions) == ["gate_passed", "Mirror", "shadow"]
    shares = []
    for _ in range(3):
        state, actions = led(state, Looked(FAST, FAST))
        shares += [action.share for action in actions if isinstance(action, Share)]
    assert shares == [0.1, 0.5]
    assert kinds(actions) == ["canary_passed", "Promote", "promoted"]
    assert (state.live, state.previous, state.candidate) == (2, 1, None)


def test_what_the_policy_leaves_out_is_left_out():
    state, _ = led(begin(Policy(shadow_requests=0, canary_shares=())), Found(1), Loaded(1), Gated(1, ()))
    _, actions = led(state, Found(2), Loaded(2), Gated(2, ()))
    assert kinds(actions) == ["gate_passed", "Promote", "promoted"]


def test_one_that_cannot_be_loaded_is_refused_with_the_reason(live: State):
    state, actions = led(live, Found(2), LoadFailed(2, "it is damaged"))
    assert actions == [Note("load_refused", 2, ("it is damaged",)), Retire(2)]
    assert (state.live, state.refused) == (1, {2})


def test_one_that_is_worse_is_refused_at_the_gate(live: State):
    state, actions = led(live, Found(2), Loaded(2), Gated(2, (GOOD, BAD)))
    assert actions[0] == Note("gate_refused", 2, ("accuracy: 0.5 where >= 0.9 is needed",))
    assert (state.live, state.candidate) == (1, None)


@pytest.mark.parametrize("stage", [Stage.SHADOW, Stage.CANARY])
@pytest.mark.parametrize(("seen", "reason"), [(BROKEN, "ValueError: no"), (SLOW, "median of 100.00 ms")])
def test_one_that_fails_or_is_slow_with_requests_is_refused(live: State, stage: Stage, seen: Observed, reason: str):
    state, actions = led(at(live, stage), Looked(seen, FAST))
    assert kinds(actions) == [f"{stage}_refused", "Retire"]
    assert reason in str(actions[0]) and state.live == 1


def test_one_whose_answers_differ_too_often_is_refused():
    state, _ = led(begin(Policy(max_differing=0.1)), Found(1), Loaded(1), Gated(1, ()))
    _, actions = led(at(state, Stage.SHADOW), Looked(Observed(100, num_differing=20, p50_s=0.001), FAST))
    assert actions[0] == Note("shadow_refused", 2, ("answers: 20 of 100 answers differ",))


def test_one_that_fails_at_once_is_refused_at_once(live: State):
    some = replace(BROKEN, num=20, num_failed=20)
    assert kinds(led(at(live, Stage.CANARY), Looked(some, NOTHING))[1]) == ["canary_refused", "Retire"]


def test_a_stage_waits_for_its_requests_but_not_for_ever(live: State):
    state = at(live, Stage.SHADOW)
    few = Observed(3, p50_s=0.001)
    assert led(state, Looked(few, FAST), now_s=29.0) == (state, [])
    assert kinds(led(state, Looked(few, FAST), now_s=30.0)[1])[0] == "shadow_passed"
    assert kinds(led(state, Looked(NOTHING, NOTHING), now_s=30.0)[1])[0] == "shadow_passed"


def test_a_live_version_that_turns_bad_is_rolled_back_while_it_is_watched(live: State):
    state, _ = led(at(live, Stage.CANARY, level=1), Looked(FAST, FAST))
    assert state.live == 2
    assert led(state, Looked(FAST, FAST))[1] == []
    back, actions = led(state, Looked(BROKEN, FAST), now_s=59.0)
    assert actions[0] == Promote(1) and kinds(actions) == ["Promote", "rolled_back", "Retire"]
    assert (back.live, back.previous, back.refused) == (1, None, {2})
    assert led(state, Looked(BROKEN, FAST), now_s=60.0)[1] == []


def test_what_was_refused_is_not_tried_again_but_what_comes_later_is(live: State):
    state, _ = led(live, Found(2), LoadFailed(2, "no"))
    assert led(state, Found(2)) == (state, [])
    assert led(state, Found(3))[1][0] == Load(3)


def test_of_those_that_come_meanwhile_only_the_newest_is_next(live: State):
    state, actions = led(at(live, Stage.GATE), Found(3), Found(4), Found(3))
    assert (state.newest, actions) == (4, [])
    _, actions = led(state, Gated(2, (BAD,)))
    assert kinds(actions) == ["gate_refused", "Retire", "Load", "candidate"] and actions[2] == Load(4)


def test_only_two_stay_loaded(live: State):
    state = live
    for version in (2, 3):
        state, _ = led(state, Found(version))
        state, actions = led(state, PromoteAsked(), Loaded(version))
    assert (state.live, state.previous) == (3, 2)
    assert Retire(1) in actions


def test_somebody_promotes_the_candidate_whatever_it_shows(live: State):
    for stage in (Stage.GATE, Stage.SHADOW, Stage.CANARY):
        state, actions = led(at(live, stage), PromoteAsked())
        assert actions[0] == Promote(2) and state.live == 2
    state, actions = led(at(live, Stage.LOADING), PromoteAsked(2), Loaded(2))
    assert actions[0] == Promote(2)


def test_somebody_promotes_one_that_is_stored_or_was_refused(live: State):
    state, _ = led(live, Found(2), LoadFailed(2, "no"), Found(3))
    state, actions = led(state, PromoteAsked(2))
    assert kinds(actions) == ["candidate_dropped", "Retire", "Load", "candidate"] and actions[2] == Load(2)
    state, actions = led(state, Loaded(2))
    assert (state.live, state.previous, state.refused) == (2, 1, frozenset())


def test_somebody_goes_back_and_forth_between_the_two_that_are_loaded(live: State):
    state, _ = led(live, Found(2), PromoteAsked(), Loaded(2))
    back, actions = led(state, PromoteAsked(1))
    assert actions[0] == Promote(1) and (back.live, back.previous) == (1, 2)


def test_somebody_rolls_back(live: State):
    state, _ = led(live, Found(2), PromoteAsked(), Loaded(2))
    state, actions = led(state, RollbackAsked())
    assert kinds(actions) == ["Promote", "rolled_back", "Retire"] and (state.live, state.refused) == (1, {2})
    _, actions = led(state, RollbackAsked())
    assert isinstance(actions[0], Deny) and "no version before the live one" in actions[0].reason


def test_rolling_back_gives_up_a_candidate_that_sees_requests(live: State):
    state, actions = led(at(live, Stage.CANARY), RollbackAsked())
    assert kinds(actions) == ["candidate_refused", "Retire"] and state.live == 1


@pytest.mark.parametrize(("asked", "reason"), [(PromoteAsked(), "on its way"), (PromoteAsked(1), "live already")])
def test_a_demand_that_cannot_be_met_is_denied(live: State, asked: PromoteAsked, reason: str):
    state, (deny,) = led(live, asked)
    assert isinstance(deny, Deny) and reason in deny.reason and state == live


def test_what_is_told_too_late_changes_nothing(live: State):
    for event in (Loaded(7), LoadFailed(7, "x"), Gated(7, (BAD,)), Gated(2, (GOOD,))):
        assert led(live, event) == (live, [])
    shadow = at(live, Stage.SHADOW)
    assert led(shadow, Loaded(2)) == (shadow, [])
    assert not [action for action in led(shadow, Found(1))[1] if isinstance(action, Mirror)]


@pytest.mark.parametrize(
    ("text", "figures", "live", "is_met"),
    [
        ("accuracy>=0.9", {"accuracy": 0.9}, None, True),
        ("accuracy >= .9", {"accuracy": 0.89}, None, False),
        ("loss<=live+0.01", {"loss": 0.31}, {"loss": 0.3}, True),
        ("loss<=live + 1e-3", {"loss": 0.31}, {"loss": 0.3}, False),
        ("accuracy>=live-0.01", {"accuracy": 0.895}, {"accuracy": 0.9}, True),
        ("accuracy>=live", {"accuracy": 0.895}, {"accuracy": 0.9}, False),
        ("accuracy>=live", {"accuracy": 0.1}, None, True),
        ("accuracy>=0.9", {"loss": 0.1}, None, False),
        ("accuracy>=0.9", {"accuracy": float("nan")}, None, False),
    ],
)
def test_a_threshold_is_a_number_or_what_the_live_version_has(text, figures, live, is_met):
    assert parse_threshold(text).check(figures, live).is_met == is_met


@pytest.mark.parametrize("text", ["", "accuracy", "accuracy>0.9", "accuracy>=", ">=0.9", "accuracy>=best", "a b>=1"])
def test_what_is_no_threshold_is_refused(text):
    with pytest.raises(ConfigError, match="a gate looks like"):
        parse_threshold(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"canary_shares": (1.0,)},
        {"max_slowdown": 0.5},
        {"shadow_requests": -1},
        {"stage_s": float("nan")},
        {"gate_s": 0.0},
    ],
)
def test_a_policy_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Policy(**wrong)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_the_live_version_stays_loaded_and_nothing_is_loaded_for_ever(seed: int):
    chance, state, loaded, answers = Random(seed), begin(), set[int](), 0
    for now in range(60):
        newest = chance.randint(0, 9)
        event = chance.choice([
            Found(newest), Loaded(newest), LoadFailed(newest, "no"), Gated(newest, (chance.choice([GOOD, BAD]),)),
            Looked(chance.choice([FAST, SLOW, BROKEN]), FAST), PromoteAsked(chance.choice([None, newest])),
            RollbackAsked(),
        ])  # fmt: skip
        if state.candidate is not None and chance.random() < 0.5:
            event = chance.choice([Loaded(state.candidate.version), Gated(state.candidate.version, (GOOD,))])
        state, actions = step(state, event, float(now * 10))
        for action in actions:
            match action:
                case Load(version):
                    assert version not in loaded
                    loaded.add(version)
                case Retire(version):
                    assert version != state.live
                    loaded.remove(version)
                case Promote(version) | Share(version, _) | Mirror(version):
                    assert version in loaded
                    answers += isinstance(action, Promote)
        on_way = {state.candidate.version} if state.candidate else set()
        assert loaded == ({state.live, state.previous} | on_way) - {None}
        assert state.live is not None or not answers
