"""How many lanes each worker can carry: measures in, shares out. Pure; the caller brings the time.

A synchronous step ends when the slowest worker does. One with n lanes is taken to be done after ``n * lane_s + link_s``
seconds, and the shares are those with which the last one is done first. Lanes move only when that has been worth it
for a while: see ``consider``.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, isfinite
from statistics import fmean, harmonic_mean, median

_WINDOW = 5
_LEAST_MEASURES = 3
_LONG_WAIT = 1 / 3
_LEAST_KEPT = 1 / 3


@dataclass(frozen=True)
class Cost:
    """What a step costs a worker, in seconds.

    ``compute_s``: for its own ``num_samples`` samples. ``link_s``: in which its link was in use, however many samples
    it computed. ``step_s``: the whole step, with all waiting. 0 where it is not known.
    """

    compute_s: float
    num_samples: float
    link_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True)
class Pace:
    """Seconds a lane and seconds besides, in every step."""

    lane_s: float
    link_s: float = 0.0

    def finish_s(self, num_lanes: int) -> float:
        """When a worker with so many lanes is done."""
        return num_lanes * self.lane_s + self.link_s


Paces = Mapping[str, Pace]


@dataclass(frozen=True)
class Measure:
    """Every worker's pace at some time, and how long the whole step took; 0 if that is not known."""

    paces: Paces
    step_s: float


@dataclass(frozen=True)
class Hysteresis:
    """``least_gain``: the part of a step that a move must save. ``settle_s``: how long twice as much must be there."""

    least_gain: float = 0.1
    settle_s: float = 1.5


@dataclass(frozen=True)
class Balance:
    """What is known of the workers. Deals go by ``paces``, which change only when lanes are to move.

    ``recent``: measures under the present deal, oldest first. ``evidence_s``: seconds of a step's time that the present
    deal has wasted beyond what is put up with. ``counts_links``: whether a slow link has not yet been seen to cost all
    members the same. ``in_doubt_above_s``: it has, if the first steps after a move take longer than this.
    """

    paces: Paces = field(default_factory=dict)
    least_lanes: int = 1
    counts_links: bool = True
    in_doubt_above_s: float = inf
    recent: tuple[Measure, ...] = ()
    measured_at_s: float = 0.0
    evidence_s: float = 0.0

    def among(self, workers: Iterable[str]) -> Balance:
        """Under another deal, with these workers: measures of the old one say nothing, paces hold until found wrong."""
        return Balance({w: self.paces[w] for w in workers if w in self.paces}, self.least_lanes, self.counts_links)


def consider(
    balance: Balance, costs: Mapping[str, Cost], at_s: float, shares: Mapping[str, int], hysteresis: Hysteresis
) -> tuple[Balance, bool]:
    """Take in one measure of every worker, and tell whether lanes are to move; the new ``paces`` then say where to.

    A worker's pace is its median over the last measures. The gain is the part of a step that the best shares would
    save. What it exceeds ``least_gain`` by adds up over time, what it falls short by is taken off (a one-sided CUSUM:
    Page 1954, Continuous Inspection Schemes), and lanes move when ``least_gain * settle_s`` is reached: soon for a
    large gain, late for a small one, never for noise about none.

    What every step costs whatever its samples counts here as a cost of lanes. So a worker with few of them looks
    slower than it is, and too little is moved, never too much: each move brings it nearer. While one waits for more
    than a third of every step, any gain therefore adds up.

    Whether a slow link can be made up for by fewer lanes depends on the strategy: where every member's exchange waits
    for it, it cannot. So a move must bring a third of what it promised. If it does not, links no longer count.
    """
    num_lanes, least_lanes = sum(shares.values()), _least_lanes(costs, sum(shares.values()))
    measure = Measure(_paces(costs, num_lanes), median(cost.step_s for cost in costs.values()))
    if not measure.paces:
        return balance, False
    elapsed_s = min(at_s - balance.measured_at_s, hysteresis.settle_s / _LEAST_MEASURES) if balance.recent else 0.0
    balance = replace(balance, recent=(*balance.recent, measure)[-_WINDOW:], measured_at_s=at_s)
    if len(balance.recent) < _LEAST_MEASURES:
        return balance, False
    step_s = median(measure.step_s for measure in balance.recent)
    is_in_doubt = balance.counts_links and step_s > balance.in_doubt_above_s
    counts_links = balance.counts_links and not is_in_doubt
    paces = _medians([measure.paces for measure in balance.recent], counts_links=counts_links)
    best = share_out(paces, shares, num_lanes, least_lanes)
    if is_in_doubt:
        return Balance(paces, least_lanes, counts_links=False), best != shares
    gain, waits_long = _gain(paces, shares, best, step_s)
    needed = 0.0 if waits_long else hysteresis.least_gain
    evidence_s = max(0.0, balance.evidence_s + (gain - needed) * max(0.0, elapsed_s))
    if evidence_s < hysteresis.least_gain * hysteresis.settle_s:
        return replace(balance, evidence_s=evidence_s, in_doubt_above_s=inf), False
    return Balance(paces, least_lanes, counts_links, step_s * (1 - gain * _LEAST_KEPT) if step_s else inf), True


def _medians(measures: Sequence[Paces], *, counts_links: bool) -> dict[str, Pace]:
    return {
        w: Pace(median(m[w].lane_s for m in measures), median(m[w].link_s for m in measures) if counts_links else 0.0)
        for w in measures[-1]
    }


def _gain(paces: Paces, shares: Mapping[str, int], best: Mapping[str, int], whole_s: float) -> tuple[float, bool]:
    """What part of a step the best shares would save, and whether someone waits for much of it."""
    present_s, best_s = ([paces[w].finish_s(n) for w, n in given.items()] for given in (shares, best))
    step_s = max(*present_s, whole_s)
    return (max(present_s) - max(best_s)) / step_s, max(present_s) - min(present_s) > _LONG_WAIT * step_s


def share_out(paces: Paces, held: Mapping[str, int], num_lanes: int, least_lanes: int = 1) -> dict[str, int]:
    """How many of ``num_lanes`` each worker gets, so that the last of them is done first.

    Each next lane goes to whom it makes done first, which is optimal since no lane makes anyone done earlier (Ibaraki
    and Katoh 1988, Resource Allocation Problems); ties go to who has held as many. No one gets fewer than
    ``least_lanes``, or than an equal share if that is less. Cost: lanes x log(workers).
    """
    floor = min(least_lanes, num_lanes // len(paces))
    shares = dict.fromkeys(paces, floor)
    rank = {worker: i for i, worker in enumerate(paces)}

    def offer(worker: str) -> tuple[float, bool, int, str]:
        num_own = shares[worker]
        return paces[worker].finish_s(num_own + 1), num_own >= held.get(worker, 0), rank[worker], worker

    offers = [offer(worker) for worker in paces]
    heapq.heapify(offers)
    for _ in range(num_lanes - floor * len(paces)):
        *_, worker = offers[0]
        shares[worker] += 1
        heapq.heapreplace(offers, offer(worker))
    return shares


def paces_of(workers: Iterable[str], known: Paces) -> dict[str, Pace]:
    """A pace for each; who has not been measured is taken for as fast as the others are on average. Some is known."""
    speed_s = harmonic_mean([pace.lane_s for pace in known.values()])
    usual = Pace(speed_s, fmean(pace.link_s for pace in known.values()))
    return {w: known.get(w, usual) for w in workers}


def _paces(costs: Mapping[str, Cost], num_lanes: int) -> dict[str, Pace]:
    """What one measure says; nothing if it says it of no one. Who has computed no sample is taken for average."""
    per_lane = sum(cost.num_samples for cost in costs.values()) / num_lanes
    known = {w: Pace(c.compute_s / c.num_samples * per_lane, c.link_s) for w, c in costs.items() if _is_measured(c)}
    return paces_of(costs, known) if known else {}


def _is_measured(cost: Cost) -> bool:
    is_finite = all(map(isfinite, (cost.compute_s, cost.num_samples, cost.link_s, cost.step_s)))
    return is_finite and cost.compute_s > 0 < cost.num_samples and cost.link_s >= 0


def _least_lanes(costs: Mapping[str, Cost], num_lanes: int) -> int:
    """As many as have a sample in every step: who computes none cannot be measured."""
    return max(1, ceil(num_lanes / max(1.0, sum(cost.num_samples for cost in costs.values()))))
