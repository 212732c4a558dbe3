"""Gradients laid side by side in a few flat tensors, so that one collective carries many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Bucket:
    """Parameters of one dtype and device, and one flat tensor for their gradients.

    The flat tensor ends with one entry a parameter that says whether this worker's backward reached it: summed over the
    workers, 0 means that no one used it, and its gradient is None as in a plain loop.
    """

    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    used: Tensor
    reached: set[int] = field(default_factory=set)
    """Parameters that a backward of this step has reached."""
    final: set[int] = field(default_factory=set)
    """Those that the step's last backward has reached: their gradients are whole."""

    @staticmethod
    def of(parameters: Sequence[nn.Parameter]) -> Bucket:
        first = parameters[0]
        sizes = [p.numel() for p in parameters]
        flat = torch.zeros(sum(sizes) + len(parameters), dtype=first.dtype, device=first.device)
        pieces = torch.split(flat[: sum(sizes)], sizes)
        views = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        return Bucket(list(parameters), flat, views, flat[sum(sizes) :])

    @property
    def full(self) -> bool:
        """Whether every gradient is whole."""
        return len(self.final) == len(self.parameters)

    def clear(self) -> None:
        """Zero, and make the views the parameters' gradients, for backward to add to."""
        self.flat.zero_()
        self.reached.clear()
        self.final.clear()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view

    def seal(self) -> None:
        """Note which parameters were reached, just before the flat tensor is sent."""
        if len(self.reached) == len(self.parameters):
            self.used.fill_(1)
        else:
            self.used[list(self.reached)] = 1


def cut(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[Bucket]:
    """Buckets of about ``bucket_bytes`` in reverse order, which is about the order in which backward finishes."""
    buckets: list[Bucket] = []
    group: list[nn.Parameter] = []
    size = 0
    for parameter in reversed(parameters):
        alike = not group or (parameter.dtype == group[0].dtype and parameter.device == group[0].device)
        if group and (not alike or size + parameter.nbytes > bucket_bytes):
            buckets.append(Bucket.of(group))
            group, size = [], 0
        group.append(parameter)
        size += parameter.nbytes
    if group:
        buckets.append(Bucket.of(group))
    return buckets
