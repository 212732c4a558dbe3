"""Fault plans and reference twins, for tests and benchmarks of shoal and of what is built on it."""

from shoal.testing.faults import Fault, FaultPlan, Inflicted
from shoal.testing.twins import plain_loop

__all__ = ["Fault", "FaultPlan", "Inflicted", "plain_loop"]
