"""What passes between a strategy and the loop that drives it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreed:
    """What the workers agreed in one exchange: flat gradients and buffers, the same bits on each."""

    gradients: list[Tensor]
    buffers: list[Tensor]

    def is_finite(self) -> bool:
        """Whether every gradient is a finite number: one pass, in float32 at least, and one wait for the device."""
        if not self.gradients:
            return True
        sums = [flat.sum(dtype=torch.promote_types(flat.dtype, torch.float32)).double() for flat in self.gradients]
        return math.isfinite(float(torch.stack(sums).sum()))

    def copy(self) -> Agreed:
        return Agreed([t.clone() for t in self.gradients], [t.clone() for t in self.buffers])


@dataclass(frozen=True)
class Share:
    """A worker's part of an exchange: ``fraction`` of its samples; ``leads``: it is the first worker that has any."""

    fraction: float
    leads: bool
