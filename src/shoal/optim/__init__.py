"""Outer optimizers: from what the workers' parameters have moved by, on average, to the next version's."""

from shoal.optim.outer import Nesterov, Outer, Plain

__all__ = ["Nesterov", "Outer", "Plain"]
