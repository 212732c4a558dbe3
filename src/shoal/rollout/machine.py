"""The roll-out as a state machine: ``step(state, event) -> (state, actions)``.

One version is *live* and answers. The one before it is kept warm. A *candidate* is loaded, then gated, then sees
mirrored traffic, then answers a growing share, then is live: or it is refused at any of these, and while it is watched
after that. A version that was refused is not tried again unless somebody says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from shoal.rollout.policy import Check, Observed, Policy, judge_traffic


class Stage(StrEnum):
    """Where a candidate is."""

    LOADING = "loading"
    GATE = "gate"
    SHADOW = "shadow"
    CANARY = "canary"


@dataclass(frozen=True)
class Candidate:
    """``level``: which of the policy's shares it answers. ``by_hand``: somebody wants it live, whatever it shows."""

    version: int
    stage: Stage
    since_s: float
    level: int = 0
    by_hand: bool = False


@dataclass(frozen=True)
class State:
    """``live``, ``previous``: versions that are loaded. ``watched_until_s``: when the live one counts as good.
    ``newest``: found, and not yet looked at. ``seen``: the newest that ever was a candidate; older ones come by hand
    only."""

    policy: Policy = field(default_factory=Policy)
    live: int | None = None
    previous: int | None = None
    candidate: Candidate | None = None
    newest: int | None = None
    seen: int = -1
    refused: frozenset[int] = frozenset()
    watched_until_s: float = 0.0


# Events


@dataclass(frozen=True)
class Found:
    """A version is stored."""

    version: int


@dataclass(frozen=True)
class Loaded:
    """The candidate is."""

    version: int


@dataclass(frozen=True)
class LoadFailed:
    """The candidate could not be loaded."""

    version: int
    reason: str


@dataclass(frozen=True)
class Gated:
    """The gate has looked at the candidate."""

    version: int
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Looked:
    """How the candidate and the live version did since the stage began; without a candidate, how the live one did since
    it is live, and the one before it did before that."""

    candidate: Observed
    live: Observed


@dataclass(frozen=True)
class PromoteAsked:
    """Have the candidate, or a stored version, answer now."""

    version: int | None = None


@dataclass(frozen=True)
class RollbackAsked:
    """Give up the candidate that sees requests, or else have the version before the live one answer again."""


Event = Found | Loaded | LoadFailed | Gated | Looked | PromoteAsked | RollbackAsked


# Actions


@dataclass(frozen=True)
class Load:
    """Load a version beside the live one."""

    version: int


@dataclass(frozen=True)
class Gate:
    """Look at the candidate: metrics, skew, replayed requests."""

    version: int


@dataclass(frozen=True)
class Mirror:
    """Have the candidate answer copies of requests, whose answers nobody gets."""

    version: int


@dataclass(frozen=True)
class Share:
    """Have the candidate answer this share of requests."""

    version: int
    share: float


@dataclass(frozen=True)
class Promote:
    """Have a loaded version answer all requests, and keep the one before it warm."""

    version: int


@dataclass(frozen=True)
class Retire:
    """Unload a version once it has answered what it was asked."""

    version: int


@dataclass(frozen=True)
class Note:
    """What was decided, and why."""

    kind: str
    version: int
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Deny:
    """What was asked cannot be done."""

    reason: str


Action = Load | Gate | Mirror | Share | Promote | Retire | Note | Deny
Result = tuple[State, list[Action]]


def begin(policy: Policy | None = None) -> State:
    """Nothing is loaded yet."""
    return State(policy or Policy())


def step(state: State, event: Event, now_s: float) -> Result:
    """What becomes of the roll-out, and what is to be done. An event of a version that is no candidate any more changes
    nothing."""
    match event:
        case Found(version):
            return _found(state, version, now_s)
        case Loaded(version) if _is(state, version, Stage.LOADING):
            return _loaded(state, now_s)
        case LoadFailed(version, reason) if _is(state, version, Stage.LOADING):
            return _refuse(state, "load_refused", (reason,), now_s)
        case Gated(version, checks) if _is(state, version, Stage.GATE):
            return _gated(state, checks, now_s)
        case Looked(candidate, live):
            return _looked(state, candidate, live, now_s)
        case PromoteAsked(version):
            return _promote_asked(state, version, now_s)
        case RollbackAsked():
            return _rollback_asked(state, now_s)
        case _:
            return state, []


def _is(state: State, version: int, stage: Stage) -> bool:
    return state.candidate is not None and (state.candidate.version, state.candidate.stage) == (version, stage)


def _found(state: State, version: int, now_s: float) -> Result:
    if version <= max(state.seen, -1 if state.newest is None else state.newest):
        return state, []
    return _next(replace(state, newest=version), now_s)


def _next(state: State, now_s: float) -> Result:
    """Begin with the newest version that waits, if none is on its way; those between are left out."""
    version = state.newest
    if version is None or state.candidate is not None:
        return state, []
    if version <= state.seen:
        return replace(state, newest=None), []
    candidate = Candidate(version, Stage.LOADING, now_s)
    state = replace(state, candidate=candidate, newest=None, seen=version)
    return state, [Load(version), Note("candidate", version)]


def _loaded(state: State, now_s: float) -> Result:
    assert state.candidate is not None
    if state.candidate.by_hand:
        return _promote(state, ("somebody asked for it",), now_s)
    return _enter(state, Stage.GATE, now_s, [Gate(state.candidate.version)])


def _enter(state: State, stage: Stage, now_s: float, actions: list[Action], level: int = 0) -> Result:
    assert state.candidate is not None
    return replace(state, candidate=replace(state.candidate, stage=stage, since_s=now_s, level=level)), actions


def _gated(state: State, checks: Sequence[Check], now_s: float) -> Result:
    assert state.candidate is not None
    version = state.candidate.version
    if wrong := [str(check) for check in checks if not check.is_met]:
        return _refuse(state, "gate_refused", tuple(wrong), now_s)
    passed: list[Action] = [Note("gate_passed", version, tuple(map(str, checks)))]
    if state.live is None:
        state, actions = _promote(state, ("it is the first",), now_s)
        return state, passed + actions
    if state.policy.shadow_requests:
        return _enter(state, Stage.SHADOW, now_s, [*passed, Mirror(version), Note("shadow", version)])
    state, actions = _share(state, 0, now_s)
    return state, passed + actions


def _share(state: State, level: int, now_s: float) -> Result:
    assert state.candidate is not None
    shares, version = state.policy.canary_shares, state.candidate.version
    if level >= len(shares):
        return _promote(state, ("it passed all stages",), now_s)
    told = Note("canary", version, (f"{shares[level]:.0%} of requests",))
    return _enter(state, Stage.CANARY, now_s, [Share(version, shares[level]), told], level)


def _looked(state: State, candidate: Observed, live: Observed, now_s: float) -> Result:
    policy, now = state.policy, state.candidate
    if now is None or now.stage in (Stage.LOADING, Stage.GATE):
        return _watched(state, candidate, live, now_s)
    needed = policy.shadow_requests if now.stage is Stage.SHADOW else policy.canary_requests
    is_over = now_s - now.since_s >= policy.stage_s
    if candidate.num < needed and not is_over:
        return _refuse_hopeless(state, candidate, live, needed, now_s)
    checks = judge_traffic(policy, candidate, live, min(needed, candidate.num))
    if wrong := [str(check) for check in checks if not check.is_met]:
        return _refuse(state, f"{now.stage}_refused", tuple(wrong), now_s)
    told = Note(f"{now.stage}_passed", now.version, (f"{candidate.num} requests", *map(str, checks)))
    state, actions = _share(state, 0 if now.stage is Stage.SHADOW else now.level + 1, now_s)
    return state, [told, *actions]


def _refuse_hopeless(state: State, candidate: Observed, live: Observed, needed: int, now_s: float) -> Result:
    """Before a stage is over: once so many have failed that it cannot end well."""
    assert state.candidate is not None
    failed = [c for c in judge_traffic(state.policy, candidate, live, needed) if c.name == "failed" and not c.is_met]
    if not failed:
        return state, []
    return _refuse(state, f"{state.candidate.stage}_refused", tuple(map(str, failed)), now_s)


def _watched(state: State, live: Observed, before: Observed, now_s: float) -> Result:
    """The live version, for a while after it was promoted."""
    if state.live is None or state.previous is None or now_s >= state.watched_until_s:
        return state, []
    checks = judge_traffic(state.policy, live, before, state.policy.canary_requests)
    wrong = tuple(str(check) for check in checks if not check.is_met)
    return _back(state, wrong) if wrong else (state, [])


def _promote(state: State, reasons: tuple[str, ...], now_s: float) -> Result:
    assert state.candidate is not None
    version, retired = state.candidate.version, state.previous
    actions: list[Action] = [Promote(version), Note("promoted", version, reasons)]
    if retired is not None and retired != version:
        actions.append(Retire(retired))
    state = replace(
        state, live=version, previous=state.live, candidate=None, watched_until_s=now_s + state.policy.watch_s,
        refused=state.refused - {version},
    )  # fmt: skip
    state, more = _next(state, now_s)
    return state, actions + more


def _refuse(state: State, kind: str, reasons: tuple[str, ...], now_s: float) -> Result:
    assert state.candidate is not None
    version = state.candidate.version
    actions: list[Action] = [Note(kind, version, reasons), Retire(version)]
    state = replace(state, candidate=None, refused=state.refused | {version})
    state, more = _next(state, now_s)
    return state, actions + more


def _back(state: State, reasons: tuple[str, ...]) -> Result:
    assert state.live is not None and state.previous is not None
    bad, good = state.live, state.previous
    actions: list[Action] = [Promote(good), Note("rolled_back", bad, reasons), Retire(bad)]
    return replace(state, live=good, previous=None, refused=state.refused | {bad}, watched_until_s=0.0), actions


def _promote_asked(state: State, version: int | None, now_s: float) -> Result:
    now = state.candidate
    wanted = version if version is not None else (now.version if now else None)
    if wanted is None:
        return state, [Deny("no version is on its way: name one that is stored")]
    if wanted == state.live:
        return state, [Deny(f"version {wanted} is live already")]
    asked = ("somebody asked for it",)
    if now is not None and wanted == now.version:
        if now.stage is Stage.LOADING:
            return replace(state, candidate=replace(now, by_hand=True)), []
        return _promote(state, asked, now_s)
    if wanted == state.previous:
        swapped = replace(state, live=wanted, previous=state.live, watched_until_s=0.0)
        return swapped, [Promote(wanted), Note("promoted", wanted, asked)]
    actions: list[Action] = []
    if now is not None:
        actions = [Note("candidate_dropped", now.version, (f"version {wanted} was asked for",)), Retire(now.version)]
    candidate = Candidate(wanted, Stage.LOADING, now_s, by_hand=True)
    state = replace(state, candidate=candidate, seen=max(state.seen, wanted))
    return state, [*actions, Load(wanted), Note("candidate", wanted, asked)]


def _rollback_asked(state: State, now_s: float) -> Result:
    asked = ("somebody asked for it",)
    if state.candidate is not None and state.candidate.stage in (Stage.SHADOW, Stage.CANARY):
        return _refuse(state, "candidate_refused", asked, now_s)
    if state.previous is None:
        return state, [Deny("no version before the live one is loaded: promote one that is stored, by its number")]
    return _back(state, asked)
