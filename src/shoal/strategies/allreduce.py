"""Synchronous data parallelism: every step, all workers agree on one averaged gradient.

Gradients travel in buckets while backward still runs (Li et al. 2020, "PyTorch Distributed", arXiv:2006.15704, section
3.2.3). Deviations: a worker's loss is weighted by its share of the step's samples before backward, so the sum of the
gradients is the exact mean over all samples however unequal the shares; gradients live in the buckets, which saves a
copy; parameters that no worker used keep a gradient of None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shoal.comm.collectives import Group, Work
from shoal.errors import ConfigError
from shoal.strategies.buckets import Bucket, cut
from shoal.strategies.buffers import AgreedBuffers


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """Average gradients at every step.

    Wire: about twice the model's bytes a step and worker, whatever the number of workers. ``bucket_bytes``: smaller
    buckets start earlier and cost more messages.
    """

    bucket_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1024:
            raise ConfigError(f"bucket_bytes must be at least 1024, not {self.bucket_bytes}")

    def bind(self, model: nn.Module) -> Reducer:
        """The exchange for this model's gradients and buffers, to be used by one worker."""
        return Reducer(model, self.bucket_bytes)


@dataclass(frozen=True)
class Agreed:
    """What the workers agreed in one step: the flat gradients and buffers, the same bits on each."""

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
    """A worker's part of a step: ``fraction`` of its samples; ``leads``: it is the first worker that has any."""

    fraction: float
    leads: bool


class Reducer:
    """One worker's side of the exchange. ``begin``, backward (the last one ``armed``), ``finish``, ``apply``.

    After an error in any of them: ``roll_back``, and begin again with another group.
    """

    def __init__(self, model: nn.Module, bucket_bytes: int) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ConfigError("the task's model has no parameter that requires a gradient; there is nothing to train")
        self._buckets: list[Bucket] = []
        self._bucket_bytes = bucket_bytes
        self._buffers = AgreedBuffers(model)
        self._group: Group | None = None
        self._armed = False
        self._works: list[Work] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def begin(self, group: Group) -> None:
        """Clear the gradients for a step among ``group``."""
        self._group, self._armed = group, False
        self._works = []
        if group.seat.world_size == 1:
            self._release()
            for parameter in self._parameters:
                parameter.grad = None
            return
        if not self._buckets:
            self._lay_out()
        for bucket in self._buckets:
            bucket.clear()

    def _lay_out(self) -> None:
        self._buckets = cut(self._parameters, self._bucket_bytes)
        for bucket in self._buckets:
            for index, parameter in enumerate(bucket.parameters):
                hook = partial(self._reached, bucket, index)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _release(self) -> None:
        """A lone worker needs neither buckets nor hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._buckets = [], []

    def arm(self) -> None:
        """The next backward is the step's last: send each bucket as soon as it is full."""
        self._armed = True

    def _reached(self, bucket: Bucket, index: int, parameter: Tensor) -> None:
        assert self._group is not None
        self._group.check()  # what is left of this backward would be for nothing
        bucket.reached.add(index)
        if self._armed:
            bucket.final.add(index)
            if bucket.full:
                self._send_full()

    def _send_full(self) -> None:
        """Send in bucket order, the same on every worker, as far as the buckets are full."""
        while len(self._works) < len(self._buckets) and self._buckets[len(self._works)].full:
            self._send_next()

    def _send_next(self) -> None:
        assert self._group is not None
        bucket = self._buckets[len(self._works)]
        bucket.seal()
        self._works.append(self._group.all_reduce(bucket.flat))

    def finish(self, share: Share) -> Agreed:
        """Send what is left and wait for everything. The result lives in the buckets until the next ``begin``."""
        assert self._group is not None
        while len(self._works) < len(self._buckets):
            self._send_next()
        buffers = self._buffers.send(self._group, share.fraction, leads=share.leads)
        for work in self._works:
            work.wait()
        for _, work in buffers:
            work.wait()
        if not self._buckets:  # a lone worker: its gradients are where backward left them
            return Agreed([p.grad for p in self._parameters if p.grad is not None], [])
        return Agreed([bucket.flat for bucket in self._buckets], [flat for flat, _ in buffers])

    def apply(self, agreed: Agreed, update: Callable[[], None]) -> None:
        """Commit: make the agreed gradients the parameters', call ``update`` (the optimizer), take the buffers."""
        for bucket, flat in zip(self._buckets, agreed.gradients if self._buckets else (), strict=True):
            if flat is not bucket.flat:
                bucket.flat.copy_(flat)
            used = bucket.used.tolist()
            for parameter, view, count in zip(bucket.parameters, bucket.views, used, strict=True):
                parameter.grad = view if count else None
        update()
        self._buffers.commit(agreed.buffers)

    def reset(self) -> None:
        """The model was restored: what its buffers hold now is committed."""
        self._buffers.keep()

    def roll_back(self) -> None:
        """Forget a step that was begun and not committed."""
        self._armed, self._works = False, []
        self._buffers.roll_back()
