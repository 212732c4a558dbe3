"""One worker's side of strategies that compute locally and exchange once a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.comm.collectives import Group, Work
from shoal.comm.exchange import Exchange, Times, exchange_for
from shoal.errors import Bug
from shoal.optim import Outer
from shoal.strategies.agreed import Agreed, Share
from shoal.strategies.buckets import Layout
from shoal.strategies.buffers import AgreedBuffers
from shoal.strategies.memories import Memories

_OUTER = "outer/"


@dataclass(frozen=True)
class _End:
    """Where local steps had led to at the end of a round: each layout's parameters, and the buffers."""

    parameters: list[Tensor]
    buffers: list[Tensor]


@dataclass
class _Flight:
    """What a round came to, on its way."""

    version: int
    end: _End | None
    """If the next round may begin meanwhile; else the model stays there."""
    sums: list[Tensor]
    buffers: list[tuple[Tensor, Work]]
    num_done: int = 0


class Rounds:
    """The version's parameters (the anchors), apart from the model's, which local steps move.

    A round is local steps; ``launch``; ``advance`` up to ``num_stages`` times, in between which the next round may be
    computed; ``finish``, ``remember`` and ``apply``. After an error: ``roll_back``; the round is launched again from
    its end, and what was computed on top of that stays, or is given up by ``rewind``.
    """

    def __init__(
        self, layouts: list[Layout], model: nn.Module, outer: Outer, sync_every_steps: int, overlap_steps: int
    ) -> None:
        self.times = Times()
        self.sync_every_steps = sync_every_steps
        self.overlap_steps = overlap_steps
        self.memories = Memories(layouts)
        self._layouts = layouts
        self._outer = outer
        self._buffers = AgreedBuffers(model)
        self._group: Group | None = None
        self._exchanges: list[Exchange] = []
        self._flight: _Flight | None = None
        self._end: _End | None = None  # of a round whose exchange did not end
        self._anchors: list[Tensor] = []
        self._states: list[tuple[Tensor, ...]] = []
        self.reset()

    # A round

    @property
    def num_stages(self) -> int:
        """How often ``advance`` has something to do."""
        return len(self._layouts) + 2

    def launch(self, group: Group, share: Share, version: int, *, goes_on: bool = False) -> None:
        """Begin to exchange what this worker's parameters have moved by, weighted by its ``share``. ``goes_on``: local
        steps may be made before ``apply``."""
        if group is not self._group:
            self._group = group
            self._exchanges = [self._exchange(layout) for layout in self._layouts]
        if self._end is not None and not goes_on:
            raise Bug("what was computed on top of a round was to be kept or given up")
        end = self._end or _End([_flat(layout) for layout in self._layouts], self._buffers.values())
        outs = [torch.empty_like(flat) if goes_on else flat for flat in end.parameters]
        for anchor, flat, out in zip(self._anchors, end.parameters, outs, strict=True):
            torch.sub(anchor, flat, out=out).mul_(share.fraction)
        buffers = self._buffers.send(group, share.fraction, leads=share.leads, values=end.buffers)
        self._end, self._flight = None, _Flight(version, end if goes_on else None, outs, buffers)

    def _exchange(self, layout: Layout) -> Exchange:
        assert self._group is not None
        codec = layout.codec if self._group.seat.world_size > 1 else None
        return exchange_for(self._group, codec, layout.num_entries, layout.shapes, self.times)

    def advance(self, num_stages: int) -> None:
        """Have so many stages done. In stage k fragment k starts, the one before it turns and the one before that ends:
        the same calls in the same order on every member."""
        flight = self._flight
        assert flight is not None
        while flight.num_done < min(num_stages, self.num_stages):
            stage = flight.num_done
            if 0 <= stage - 1 < len(self._layouts):
                self._exchanges[stage - 1].turn()
            if stage < len(self._layouts):
                self.memories.start(self._exchanges[stage], stage, flight.sums[stage], flight.version)
            if 0 <= stage - 2 < len(self._layouts):
                self._exchanges[stage - 2].end()
            flight.num_done += 1
            if stage == len(self._layouts):  # every turn is made
                self.memories.note(self._exchanges, flight.version)

    def finish(self) -> Agreed:
        """Wait for all of it."""
        flight = self._flight
        assert flight is not None
        self.advance(self.num_stages)
        self.memories.note(self._exchanges, flight.version)
        for _, work in flight.buffers:
            self.times.await_(work)
        return Agreed(flight.sums, [flat for flat, _ in flight.buffers])

    # The commit

    def remember(self, version: int) -> None:
        """``version`` is committed: keep what its exchange left to be sent."""
        self.memories.commit(version)

    def apply(self, agreed: Agreed, update: Callable[[], None], rate_change: float = 1.0) -> None:
        """Commit: an outer step. What the worker has computed since the round ended is kept, on top of it."""
        flight, self._flight = self._flight, None
        own = flight is not None and agreed.gradients[0] is flight.sums[0]
        for number, (layout, gradient) in enumerate(zip(self._layouts, agreed.gradients, strict=True)):
            anchor, state = self._outer.update(self._anchors[number], gradient, self._states[number], rate_change)
            if own and flight is not None and flight.end:
                _add(layout, flight.end.parameters[number].neg_().add_(anchor))
            else:
                _write(layout, anchor)
            self._anchors[number], self._states[number] = anchor, state
        self._buffers.commit(agreed.buffers)

    # Between rounds

    def reset(self) -> None:
        """The model was restored: what it holds now is committed."""
        self._flight = self._end = None
        self._anchors = [_flat(layout) for layout in self._layouts]
        self._states = [self._outer.init(anchor) for anchor in self._anchors]
        self._buffers.keep()

    def roll_back(self) -> None:
        """Give up an exchange that did not end; all local steps stay."""
        if self._flight is not None and self._flight.end is not None:
            self._end = self._flight.end
        self._flight = None
        self._group = None

    def rewind(self) -> None:
        """Back to the end of the round whose exchange did not end: local steps on top of it are given up."""
        if self._end is not None:
            for layout, flat in zip(self._layouts, self._end.parameters, strict=True):
                _write(layout, flat)
            self._buffers.hold(self._end.buffers)
        self._end = None

    def start_over(self) -> None:
        """Forget local steps too."""
        self._flight = self._end = None
        for layout, anchor in zip(self._layouts, self._anchors, strict=True):
            _write(layout, anchor)
        self._buffers.roll_back()

    @contextmanager
    def committed(self) -> Iterator[None]:
        """Within this the model is that of the version."""
        live = [_flat(layout) for layout in self._layouts]
        for layout, anchor in zip(self._layouts, self._anchors, strict=True):
            _write(layout, anchor)
        try:
            with self._buffers.committed():
                yield
        finally:
            for layout, flat in zip(self._layouts, live, strict=True):
                _write(layout, flat)

    def state(self) -> dict[str, Tensor]:
        """The outer optimizer's state, the same on every member, by parameter."""
        found: dict[str, Tensor] = {}
        for layout, state in zip(self._layouts, self._states, strict=True):
            for index, tensor in enumerate(state):
                found |= {f"{_OUTER}{index}/{n}": v for n, v in zip(layout.names, layout.views(tensor), strict=True)}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a version's outer state; after ``reset``."""
        for layout, state in zip(self._layouts, self._states, strict=True):
            for index, tensor in enumerate(state):
                for name, view in zip(layout.names, layout.views(tensor), strict=True):
                    if (saved := tensors.get(f"{_OUTER}{index}/{name}")) is not None:
                        view.copy_(saved)


def _flat(layout: Layout) -> Tensor:
    with torch.no_grad():
        return torch.cat([p.detach().reshape(-1) for p in layout.parameters])


def _write(layout: Layout, flat: Tensor) -> None:
    with torch.no_grad():
        for parameter, view in zip(layout.parameters, layout.views(flat), strict=True):
            parameter.copy_(view)


def _add(layout: Layout, flat: Tensor) -> None:
    with torch.no_grad():
        for parameter, view in zip(layout.parameters, layout.views(flat), strict=True):
            parameter.add_(view)
