"""What a version must show before it answers, and while it does."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.errors import ConfigError

_FORM = re.compile(
    r"\s*([A-Za-z_][\w./-]*)\s*(>=|<=)\s*(live)?\s*([+-]?\s*(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)?\s*$", re.I
)
_SLACK_S = 0.005
"""A median may be later by this much whatever the factor: what a busy machine does by itself."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and whether it is as it must be."""

    name: str
    is_met: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


@dataclass(frozen=True)
class Threshold:
    """A metric must be at least, or at most, a number, or what the version that answers now has, plus a number."""

    metric: str
    kind: Literal["at_least", "at_most"]
    number: float
    is_relative: bool = False

    def check(self, figures: Mapping[str, Any], live: Mapping[str, Any] | None) -> Check:
        """``live``: the figures of the version that answers now, if one does: without it what is relative is met."""
        sign = ">=" if self.kind == "at_least" else "<="
        name = f"{self.metric} {sign} {'live ' if self.is_relative else ''}{self.number:+g}"
        value = figures.get(self.metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            came = f"{value}" if self.metric in figures else f"there are {', '.join(figures) or 'no metrics'}"
            return Check(name, False, f"no number: {came}")
        bound = self.number
        if self.is_relative:
            known = (live or {}).get(self.metric)
            if not isinstance(known, int | float):
                return Check(name, True, f"{value:.6g}, with nothing to compare it to")
            bound += known
        is_met = value >= bound if self.kind == "at_least" else value <= bound
        return Check(name, is_met, f"{value:.6g} where {sign} {bound:.6g} is needed")


def parse_threshold(text: str) -> Threshold:
    """From ``accuracy>=0.9``, ``loss<=live+0.01``, ``accuracy>=live``. ``ConfigError`` for what is none."""
    found = _FORM.match(text)
    if found is None or not (found[3] or found[4]):
        raise ConfigError(f"a gate looks like accuracy>=0.9 or loss<=live+0.01, not {text!r}")
    number = float((found[4] or "0").replace(" ", ""))
    return Threshold(found[1], "at_least" if found[2] == ">=" else "at_most", number, found[3] is not None)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a version comes to answer.

    ``gates`` are on metrics of held-out data; it is refused, too, if the gate takes longer than ``gate_s`` in all. Then
    ``shadow_requests`` are mirrored to it, and then it answers growing shares of all requests, ``canary_requests`` at
    each; a stage is over, too, after ``stage_s``: without traffic there is nothing to see. It is refused, or after it
    answers all (for ``watch_s``) rolled back, if more than ``max_failed`` of its requests fail, or their median takes
    more than ``max_slowdown`` times as long as the live version's, or (in the shadow) more than ``max_differing`` of
    its answers are other ones.
    """

    gates: tuple[Threshold, ...] = ()
    gate_s: float = 600.0
    shadow_requests: int = 50
    canary_shares: tuple[float, ...] = (0.1, 0.5)
    canary_requests: int = 50
    stage_s: float = 30.0
    watch_s: float = 60.0
    max_failed: float = 0.01
    max_slowdown: float = 3.0
    max_differing: float = 1.0

    def __post_init__(self) -> None:
        for name in ("shadow_requests", "canary_requests", "stage_s", "watch_s", "max_failed"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not self.gate_s > 0:
            raise ConfigError(f"gate_s must be above 0, not {self.gate_s}")
        if not all(0 < share < 1 for share in self.canary_shares):
            raise ConfigError(f"canary_shares lie between 0 and 1, not {self.canary_shares}")
        if not self.max_slowdown >= 1:
            raise ConfigError(f"max_slowdown must be at least 1, not {self.max_slowdown}")


@dataclass(frozen=True)
class Observed:
    """How a version did with requests since a moment: how many, how many failed, gave another answer than the live
    version, and the median of how long they took."""

    num: int = 0
    num_failed: int = 0
    num_differing: int = 0
    p50_s: float = 0.0
    reason: str = ""


def judge_traffic(policy: Policy, candidate: Observed, live: Observed, least: int) -> list[Check]:
    """What the candidate's traffic says. A share needs ``least`` requests to be one; a single failure among fewer
    decides nothing."""
    checks = []
    enough = max(1, candidate.num, least)
    failed = candidate.num_failed / enough
    detail = f"{candidate.num_failed} of {candidate.num} requests failed"
    checks.append(Check("failed", failed <= policy.max_failed, detail + (f": {candidate.reason}" if failed else "")))
    if candidate.num >= max(1, least) and live.num and live.p50_s > 0:
        bound_s = live.p50_s * policy.max_slowdown + _SLACK_S
        detail = f"a median of {candidate.p50_s * 1e3:.2f} ms where at most {bound_s * 1e3:.2f} is needed"
        checks.append(Check("latency", candidate.p50_s <= bound_s, detail))
    if candidate.num_differing:
        share = candidate.num_differing / enough
        detail = f"{candidate.num_differing} of {candidate.num} answers differ"
        checks.append(Check("answers", share <= policy.max_differing, detail))
    return checks
