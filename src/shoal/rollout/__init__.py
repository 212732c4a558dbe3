"""Which version answers: decided apart from doing. Events in, actions out, without clocks, processes or requests."""

from shoal.rollout.machine import State, begin, step
from shoal.rollout.policy import Check, Observed, Policy, Threshold, judge_traffic, parse_threshold

__all__ = [
    "Check", "Observed", "Policy", "State", "Threshold", "begin", "judge_traffic", "parse_threshold", "step",
]  # fmt: skip
