"""Buffers, such as BatchNorm's running statistics, agreed at every commit.

Each worker updates its buffers from its own samples in forward. At the commit a floating-point buffer becomes the mean
over the workers, weighted by their samples; an integer one becomes that of the first worker that had samples. Workers
thus stay equal, a worker without samples changes nothing, and a step that is not committed leaves no trace: what
forward wrote is rolled back. Where a step is computed before the one before it is committed, the changes are agreed and
added up instead of the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shoal.comm.collectives import Group, Work

_DTYPES = (torch.float64, torch.int64)


class AgreedBuffers:
    """The buffers of ``model`` as of the last commit, and how the next ones are agreed: their values, or what has been
    ``added`` to them since."""

    def __init__(self, model: nn.Module, *, added: bool = False) -> None:
        self._live = list(model.buffers())
        self._added = added
        self._committed = self.values()

    def values(self) -> list[Tensor]:
        """A copy of what the buffers hold."""
        return [buffer.clone() for buffer in self._live]

    def send(
        self, group: Group, share: float, *, leads: bool, values: list[Tensor] | None = None
    ) -> list[tuple[Tensor, Work]]:
        """Start to sum the buffers, or what they held earlier: floating-point ones by ``share`` of the step's samples,
        integers if we lead."""
        if not self._live or (group.seat.world_size == 1 and not self._added):
            return []
        out = []
        for dtype in _DTYPES:
            weight = share if dtype.is_floating_point else int(leads)
            if flat := self._flat(dtype, self._live if values is None else values):
                if self._added:
                    flat[0].sub_(self._flat(dtype, self._committed)[0])
                agreed = flat[0] * weight if weight else torch.zeros_like(flat[0])
                out.append((agreed, group.all_reduce(agreed)))
        return out

    def _flat(self, dtype: torch.dtype, buffers: list[Tensor]) -> list[Tensor]:
        """Those of the kind of ``dtype`` as one tensor of it; none if there are none."""
        alike = [b.reshape(-1).to(dtype) for b in buffers if b.dtype.is_floating_point == dtype.is_floating_point]
        return [torch.cat(alike)] if alike else []

    def commit(self, agreed: list[Tensor]) -> None:
        """Take the sums as the committed buffers; with none, those that forward left."""
        for flat in agreed:
            known = [flat.dtype.is_floating_point == b.dtype.is_floating_point for b in self._live]
            if self._added:
                flat = flat + self._flat(flat.dtype, self._committed)[0]
            buffers = [b for b, alike in zip(self._live, known, strict=True) if alike]
            for buffer, piece in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
                buffer.copy_(piece.view(buffer.shape))
        self.keep()

    def keep(self) -> None:
        """What the buffers hold now is committed."""
        for kept, live in zip(self._committed, self._live, strict=True):
            kept.copy_(live)

    def roll_back(self) -> None:
        """Undo what forward wrote since the last commit."""
        self.hold(self._committed)

    def hold(self, values: list[Tensor]) -> None:
        """Take ``values`` as what the buffers hold; nothing of it is committed."""
        for buffer, value in zip(self._live, values, strict=True):
            buffer.copy_(value)

    @contextmanager
    def committed(self) -> Iterator[None]:
        """Within this the live buffers hold what is committed."""
        live = self.values()
        self.roll_back()
        try:
            yield
        finally:
            self.hold(live)
