"""From what the workers wrote down to what a kill cost. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one kill cost."""

    recovery_s: float
    """From the kill to the first optimizer step that a group formed after it finished, whichever step that is."""
    caught_up_s: float
    """From the kill to the first step beyond the newest that was committed before: recovery, and lost work redone."""
    lost_steps: int
    """Committed steps that were rolled back."""
    samples_lost: int
    """Samples of the epoch that are in none of the steps that made the final model."""
    samples_repeated: int
    """Samples beyond the first time that are in the steps that made the final model; redone work does not count."""


def cost_of(facts: Sequence[dict[str, Any]], killed_t: float, num_samples: int) -> Cost | None:
    """The cost of the kill at ``killed_t``; None if no group formed after it went beyond the step reached before."""
    commits = _commits(facts)
    before = {f["group"] for f in commits if f["t"] <= killed_t}
    after = [f for f in commits if f["t"] > killed_t and f["group"] not in before]
    reached = max(f["step"] for f in commits if f["group"] in before)
    beyond = [f for f in after if f["step"] > reached]
    if not beyond:
        return None
    times = samples_used(facts)
    return Cost(
        recovery_s=after[0]["t"] - killed_t,
        caught_up_s=beyond[0]["t"] - killed_t,
        lost_steps=reached + 1 - min(f["step"] for f in after),
        samples_lost=num_samples - len(times),
        samples_repeated=sum(times.values()) - len(times),
    )


def samples_used(facts: Sequence[dict[str, Any]]) -> Counter[int]:
    """How often each sample is in the final model: for every step, what the last group to commit it was offered."""
    group_of = {f["step"]: f["group"] for f in _commits(facts)}
    offers = {
        (f["step"], f["rank"]): f["samples"]
        for f in facts
        if f["event"] == "offer" and group_of.get(f["step"]) == f["group"]
    }
    return Counter(sample for samples in offers.values() for sample in samples)


def _commits(facts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((f for f in facts if f["event"] == "commit"), key=lambda f: f["t"])
