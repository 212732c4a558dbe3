"""Synchronous data parallelism: every step, all workers agree on one averaged gradient.

Gradients travel in buckets while backward still runs (Li et al. 2020, "PyTorch Distributed", arXiv:2006.15704, section
3.2.3). Deviations: a worker's loss is weighted by its share of the step's samples before backward, so the sum of the
gradients is the exact mean over all samples however unequal the shares; gradients live in the buckets, which saves a
copy; parameters that no worker used keep a gradient of None.

With ``delay=1`` the exchange of a step's gradients has all of the next step's computation to hide behind: gradients are
computed from the parameters of one update earlier (pipelined SGD, Li et al. 2018, "Pipe-SGD", arXiv:1811.03619,
Algorithm 1, with K = 2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from shoal.codecs import Codec, PowerSGD
from shoal.comm.collectives import Group, Work
from shoal.comm.exchange import Exchange, Times, exchange_for
from shoal.errors import ConfigError
from shoal.strategies.agreed import Agreed, Share
from shoal.strategies.buckets import Bucket, Layout, Packing
from shoal.strategies.buffers import AgreedBuffers
from shoal.strategies.memories import Memories

__all__ = ["AllReduce", "Reducer"]


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """Average gradients at every step.

    Wire: about twice the model's bytes a step and worker, whatever the number of workers; with a ``codec`` about twice
    its payload. ``bucket_bytes``: smaller buckets start earlier and cost more messages. ``uncompressed``: patterns of
    the names of parameters that the codec is not for, such as ``("*.bias", "norm*")``. ``delay=1``: each gradient is
    applied one step late, and its exchange hidden behind the next step's computation. After a change of membership the
    first gradient is not late.
    """

    codec: Codec | None = None
    delay: int = 0
    uncompressed: tuple[str, ...] = ()
    bucket_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        if self.delay not in (0, 1):
            raise ConfigError(f"delay must be 0 or 1, not {self.delay!r}")
        if self.delay and isinstance(self.codec, PowerSGD):
            raise ConfigError(
                "delay=1 begins the next exchange before PowerSGD's second round, which tells what it left, has ended;"
                " use delay=0 or another codec"
            )
        self._packing()

    def _packing(self) -> Packing:
        return Packing(self.bucket_bytes, self.codec, self.uncompressed)

    def bind(self, model: nn.Module) -> Reducer:
        """The exchange for this model's gradients and buffers, to be used by one worker."""
        return Reducer(self._packing().lay_out(model), model, self.delay)


@dataclass
class _Flight:
    """A step's gradients on their way."""

    step: int
    buckets: list[Bucket]
    exchanges: list[Exchange]
    num_started: int = 0
    turned: bool = False
    used: tuple[Tensor, Work] | None = None
    buffers: list[tuple[Tensor, Work]] = field(default_factory=list)


class Reducer:
    """One worker's side of the exchange. A step is ``begin``, backward (the last one ``armed``), ``launch``; then, or
    with ``delay`` after the next one's ``launch``, ``finish``, ``remember`` and ``apply``.

    After an error in any of them: ``roll_back``, and begin again with another group.
    """

    def __init__(self, layouts: list[Layout], model: nn.Module, delay: int) -> None:
        self.times = Times()
        self.delay = delay
        self._layouts = layouts
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._compresses = any(layout.codec is not None for layout in layouts)
        self._buffers = AgreedBuffers(model, added=delay > 0)
        self.memories = Memories(layouts)
        """What this worker has not sent yet, and its codecs' state."""
        self._sets: list[list[Bucket]] = []
        self._exchanges: list[list[Exchange]] = []
        self._group: Group | None = None
        self._armed = False
        self._flights: deque[_Flight] = deque()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    # A step

    def begin(self, group: Group, step: int = 0) -> None:
        """Clear the gradients for ``step`` among ``group``."""
        if group is not self._group:
            self._meet(group)
        self._armed = False
        if self.delay:
            self._buffers.roll_back()
        if self._is_alone:
            for parameter in self._parameters:
                parameter.grad = None
            self._flights.append(_Flight(step, [], []))
            return
        busy = [flight.buckets for flight in self._flights]
        index = next(i for i, buckets in enumerate(self._sets) if not any(buckets is other for other in busy))
        for bucket in self._sets[index]:
            bucket.clear()
        self._flights.append(_Flight(step, self._sets[index], self._exchanges[index]))

    @property
    def _is_alone(self) -> bool:
        """A lone worker needs neither buckets nor hooks, unless its gradients wait or some are still to be sent."""
        return self._group is not None and self._group.seat.world_size == 1 and not self.delay and not self._compresses

    def _meet(self, group: Group) -> None:
        self._group = group
        self._exchanges = []
        if self._is_alone:
            for hook in self._hooks:
                hook.remove()
            self._hooks, self._sets = [], []
            return
        if not self._sets:
            self._sets = [[Bucket.of(layout) for layout in self._layouts] for _ in range(self.delay + 1)]
            self._hook_up()
        for _ in self._sets:
            self._exchanges.append([self._exchange(layout) for layout in self._layouts])

    def _exchange(self, layout: Layout) -> Exchange:
        assert self._group is not None
        codec = layout.codec if self._group.seat.world_size > 1 else None
        return exchange_for(self._group, codec, layout.num_entries, layout.shapes, self.times)

    def _hook_up(self) -> None:
        for number, layout in enumerate(self._layouts):
            for index, parameter in enumerate(layout.parameters):
                hook = partial(self._reached, number, index)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def arm(self) -> None:
        """The next backward is the step's last: send each bucket as soon as it is full."""
        self._armed = True
        for earlier in list(self._flights)[:-1]:
            self._turn(earlier)

    def _reached(self, number: int, index: int, parameter: Tensor) -> None:
        if self._group is None or not self._flights:
            return
        self._group.check()  # what is left of this backward would be for nothing
        flight = self._flights[-1]
        bucket = flight.buckets[number]
        bucket.reached.add(index)
        if self._armed:
            bucket.take(index)
            if bucket.full:
                self._send_full(flight)

    def _send_full(self, flight: _Flight) -> None:
        """Send in bucket order, the same on every worker, as far as the buckets are full."""
        while flight.num_started < len(flight.buckets) and flight.buckets[flight.num_started].full:
            self._send_next(flight)

    def _send_next(self, flight: _Flight) -> None:
        number = flight.num_started
        bucket = flight.buckets[number]
        bucket.seal()
        self.memories.start(flight.exchanges[number], number, bucket.flat, flight.step + 1)
        flight.num_started += 1

    def launch(self, share: Share) -> None:
        """Send what is left of the step that was begun last."""
        assert self._group is not None
        flight = self._flights[-1]
        if not self._armed:
            self.arm()
        while flight.num_started < len(flight.buckets):
            self._send_next(flight)
        if self._compresses and not self._is_alone:
            used = torch.cat([bucket.used for bucket in flight.buckets if bucket.layout.codec is not None])
            flight.used = used, self._group.all_reduce(used)
        flight.buffers = self._buffers.send(self._group, share.fraction, leads=share.leads)

    def finish(self) -> Agreed:
        """Wait for the step that was begun first. The result lives in the buckets until they are needed again."""
        flight = self._flights[0]
        self._turn(flight)
        for exchange in flight.exchanges:
            exchange.end()
        if flight.used is not None:
            self.times.await_(flight.used[1])
        for _, work in flight.buffers:
            self.times.await_(work)
        self.memories.note(flight.exchanges, flight.step + 1)
        self._flights.popleft()
        if not flight.buckets:  # a lone worker: its gradients are where backward left them
            return Agreed([p.grad for p in self._parameters if p.grad is not None], [])
        flags = [flight.used[0]] if flight.used is not None else []
        gradients = [bucket.flat for bucket in flight.buckets]
        return Agreed([*gradients, *flags], [flat for flat, _ in flight.buffers])

    def _turn(self, flight: _Flight) -> None:
        if not flight.turned:
            flight.turned = True
            for exchange in flight.exchanges:
                exchange.turn()
            self.memories.note(flight.exchanges, flight.step + 1)

    # The commit

    def remember(self, version: int) -> None:
        """``version`` is committed: keep what its exchange left to be sent."""
        self.memories.commit(version)

    def apply(self, agreed: Agreed, update: Callable[[], None], rate_change: float = 1.0) -> None:
        """Commit: make the agreed gradients the parameters', call ``update`` (the optimizer), take the buffers."""
        if self._sets:
            for bucket in self._holding(agreed):
                bucket.hand_over()
        update()
        self._buffers.commit(agreed.buffers)

    def _holding(self, agreed: Agreed) -> list[Bucket]:
        """The buckets that hold what was agreed: their own, or others if it is a copy."""
        held = next((s for s in self._sets if s[0].flat is agreed.gradients[0]), None)
        if held is None:
            held = [Bucket.of(layout) for layout in self._layouts]
            for bucket, flat in zip(held, agreed.gradients, strict=False):
                bucket.flat.copy_(flat)
        if self._compresses:
            compressed = [bucket for bucket in held if bucket.layout.codec is not None]
            flags = torch.split(agreed.gradients[-1], [len(bucket.used) for bucket in compressed])
            for bucket, used in zip(compressed, flags, strict=True):
                bucket.used.copy_(used)
        return held

    # Between steps

    def reset(self) -> None:
        """The model was restored: what its buffers hold now is committed."""
        self._buffers.keep()

    def roll_back(self) -> None:
        """Forget what was begun and not committed. What it would have left to be sent is not forgotten yet: the others
        may have committed it."""
        self._flights.clear()
        self._armed = False
        self._group = None
        self._buffers.roll_back()

    @contextmanager
    def committed(self) -> Iterator[None]:
        """Within this the model is that of the version, which it always is between steps, but for its buffers."""
        with self._buffers.committed() if self._flights else nullcontext():
            yield

    def state(self) -> dict[str, Tensor]:
        """Nothing: the optimizer remembers."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""
