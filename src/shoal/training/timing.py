"""Where a step's time goes: from what heartbeats tell to measures for the balance and records for the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.membership import Phase, State
from shoal.membership.balance import Cost
from shoal.membership.changes import Measured

TIMES = ("compute_s", "encode_s", "wire_s", "wait_s", "decode_s", "step_s")
"""Parts of a step, and the whole, as heartbeats name them."""
BYTES = ("sent_bytes", "received_bytes")

_MEASURE_EVERY_S = 0.5
_TELL_EVERY_S = 5.0

Figures = Mapping[str, Mapping[str, Any]]
"""By worker: the figures of its last heartbeat, and that heartbeat's generation and step."""


class Timing:
    """Remembers what has been measured and told, so that no step counts twice.

    ``measured``: at most every half second, and only once every member has committed another step in this generation
    and tells other figures than it did at the last measure. ``told``: at most every 5 s, by worker its lanes and the
    parts of a step as far as they are known.
    """

    def __init__(self) -> None:
        self._measured_at_s = self._told_at_s = float("-inf")
        self._measured = self._told = (0, 0)
        self._costs: Mapping[str, Cost] = {}

    def measured(self, state: State, figures: Figures, now_s: float) -> Measured | None:
        """What a step costs each member, for the membership machine."""
        reached = _reached(state, figures)
        if now_s - self._measured_at_s < _MEASURE_EVERY_S or reached is None or reached <= self._measured:
            return None
        costs = {member: cost for member in state.members if (cost := _cost(figures[member])) is not None}
        if len(costs) < len(state.members) or any(self._costs.get(member) == cost for member, cost in costs.items()):
            return None
        self._measured_at_s, self._measured, self._costs = now_s, reached, costs
        return Measured(state.generation, now_s, costs)

    def told(self, state: State, figures: Figures, now_s: float, *, last: bool = False) -> dict[str, dict[str, float]]:
        """What the log is to say of each member; empty if it is too early or there is nothing new. ``last``: now."""
        reached = _reached(state, figures)
        if reached is None or reached <= self._told or (now_s - self._told_at_s < _TELL_EVERY_S and not last):
            return {}
        first = self._told_at_s == float("-inf")
        self._told_at_s = now_s
        if first and not last:
            return {}  # averages over the first few steps mislead
        known = {member: parts(figures[member]) for member in state.members}
        if not any(known.values()):
            return {}
        self._told = reached
        lanes = state.world.lanes if state.world else {}
        return {member: {"lanes": len(lanes.get(member, ())), **own} for member, own in known.items()}


def parts(figures: Mapping[str, Any]) -> dict[str, float]:
    """The parts of a step that a worker has told: seconds, and bytes as its kernel counts them."""
    return {name: float(figures[name]) for name in (*TIMES, *BYTES) if name in figures}


def exchange_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The names of a run's strategy and codec, from its record; ``none`` without a codec."""
    strategy = record["job"].get("strategy") or {}
    codec = strategy.get("codec") or {}
    return {"strategy": str(strategy.get("kind", "")), "codec": str(codec.get("kind", "none"))}


def _reached(state: State, figures: Figures) -> tuple[int, int] | None:
    """The generation and step that all members have committed; None while one of them has not committed any in it."""
    if state.phase not in (Phase.RUNNING, Phase.ENDED) or state.world is None:
        return None
    own = [figures.get(member, {}) for member in state.members]
    if any(f.get("generation") != state.generation or f["step"] <= state.world.base.step for f in own):
        return None
    return state.generation, min(f["step"] for f in own)


def _cost(figures: Mapping[str, Any]) -> Cost | None:
    if not {"compute_s", "samples"} <= figures.keys():
        return None
    return Cost(figures["compute_s"], figures["samples"], figures.get("link_s", 0.0), figures.get("step_s", 0.0))
