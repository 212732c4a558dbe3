"""Buffers, such as BatchNorm's running statistics, agreed at every commit.

Each worker updates its buffers from its own samples in forward. At the commit a floating-point buffer becomes the mean
over the workers, weighted by their samples; an integer one becomes that of the first worker that had samples. Workers
thus stay equal, a worker without samples changes nothing, and a step that is not committed leaves no trace: what
forward wrote is rolled back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.comm.collectives import Group, Work

_DTYPES = (torch.float64, torch.int64)


class AgreedBuffers:
    """The buffers of ``model`` as of the last commit, and how the next ones are agreed."""

    def __init__(self, model: nn.Module) -> None:
        self._live = list(model.buffers())
        self._committed = [buffer.clone() for buffer in self._live]

    def send(self, group: Group, share: float, *, leads: bool) -> list[tuple[Tensor, Work]]:
        """Start to sum the buffers: floating-point ones by ``share`` of the step's samples, integers if we lead."""
        if not self._live or group.seat.world_size == 1:
            return []
        out = []
        for dtype in _DTYPES:
            buffers = [b for b in self._live if b.dtype.is_floating_point == dtype.is_floating_point]
            weight = share if dtype.is_floating_point else int(leads)
            if buffers:
                flat = torch.cat([b.reshape(-1).to(dtype) for b in buffers])
                flat = flat * weight if weight else torch.zeros_like(flat)
                out.append((flat, group.all_reduce(flat)))
        return out

    def commit(self, agreed: list[Tensor]) -> None:
        """Take the sums as the committed buffers; with none, those that forward left."""
        for flat in agreed:
            buffers = [b for b in self._live if b.dtype.is_floating_point == flat.dtype.is_floating_point]
            for buffer, piece in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
                buffer.copy_(piece.view(buffer.shape))
        self.keep()

    def keep(self) -> None:
        """What the buffers hold now is committed."""
        for kept, live in zip(self._committed, self._live, strict=True):
            kept.copy_(live)

    def roll_back(self) -> None:
        """Undo what forward wrote since the last commit."""
        for kept, live in zip(self._committed, self._live, strict=True):
            live.copy_(kept)
