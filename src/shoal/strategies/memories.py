"""What a worker has not sent yet, and its codecs' state, as a part of the version.

The residual of a member is its own, and no other has it. It stays with its parameters: whoever holds it adds it to what
it sends of them next, so a change of the number of members needs no new cut. ``level`` spreads all members' residuals
evenly, which makes them something that can be stored, and hands over those of members that leave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.comm.collectives import Group
from shoal.comm.exchange import Exchange, Memory
from shoal.lanes.hashing import key_of
from shoal.strategies.buckets import Layout

_RESIDUAL, _STATE = "residual/", "codec/"


class Memories:
    """One worker's memories, one a layout: as of the last commit, and those of exchanges that are not committed yet."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self._layouts = layouts
        self._held = [Memory() for _ in layouts]
        self._pending: dict[int, list[Memory]] = {}
        self._rooms: list[list[Tensor]] = [[] for _ in layouts]

    @property
    def keeps_residuals(self) -> bool:
        """Whether any codec wants its residual kept."""
        return any(layout.codec is not None and layout.codec.feedback for layout in self._layouts)

    def norm(self) -> float:
        """The L2 norm of all that this worker has not sent yet."""
        norms = [float(torch.linalg.vector_norm(m.residual)) for m in self._held if m.residual is not None]
        return math.hypot(*norms)

    # Exchanges

    def start(self, exchange: Exchange, number: int, flat: Tensor, version: int) -> None:
        """Start the exchange of layout ``number`` for ``version``, on top of all that was started before."""
        newest = max((v for v in self._pending if v < version), default=None)
        memory = self._held[number] if newest is None else self._pending[newest][number]
        exchange.start(flat, memory, key_of(version, number), self._room(number))

    def _room(self, number: int) -> Tensor | None:
        """A tensor for the next residual that holds none which may still be wanted."""
        layout = self._layouts[number]
        if layout.codec is None or not layout.codec.feedback:
            return None
        wanted = [memories[number].residual for memories in (self._held, *self._pending.values())]
        for room in self._rooms[number]:
            if not any(room is residual for residual in wanted):
                return room
        first = layout.parameters[0]
        self._rooms[number].append(torch.zeros(layout.num_entries, device=first.device))
        return self._rooms[number][-1]

    def note(self, exchanges: Sequence[Exchange], version: int) -> None:
        """What the exchanges for ``version`` leave, if it is committed."""
        left = [exchange.after for exchange in exchanges]
        if left and None not in left:
            self._pending[version] = [memory for memory in left if memory is not None]

    def commit(self, version: int) -> None:
        """``version`` is committed."""
        self._held = self._pending.pop(version, self._held)

    def forget(self) -> None:
        """What was under way is not committed by anyone."""
        self._pending.clear()

    # Other versions

    def adopt(self, version: int) -> float:
        """The others hold ``version`` and this worker does not: the norm of what it has to drop.

        If it contributed all of its part of that version, and only did not hear the end, it keeps what that left.
        """
        before = self.norm()
        self._held, kept = self._pending.get(version, [Memory() for _ in self._layouts]), version in self._pending
        self._pending.clear()
        return 0.0 if kept else before

    def load(self, tensors: Mapping[str, Tensor], share: float | None) -> None:
        """Take a version's codec state, and of its residual this ``share``; None: a peer's, which goes on with it."""
        self._pending.clear()
        self._held = [self._read(number, tensors, share) for number in range(len(self._layouts))]

    def _read(self, number: int, tensors: Mapping[str, Tensor], share: float | None) -> Memory:
        layout, residual = self._layouts[number], self._held[number].residual
        device = layout.parameters[0].device
        if share is not None:
            pairs = [(tensors.get(_RESIDUAL + n), p) for n, p in zip(layout.names, layout.parameters, strict=True)]
            parts = [(torch.zeros(p.shape) if t is None else t.float()).reshape(-1) for t, p in pairs]
            residual = torch.cat(parts).to(device) * share if any(t is not None for t, _ in pairs) else None
        prefix = f"{_STATE}{number}/"
        states = {name: tensor.to(device) for name, tensor in tensors.items() if name.startswith(prefix)}
        return Memory(residual, tuple(states[f"{prefix}{i}"] for i in range(len(states))))

    # Levelling and storing

    def level(self, group: Group, *, active: bool) -> int:
        """Spread what the members have not sent yet evenly over those that are ``active``, and count these. A
        collective call.

        Wire: an all-reduce of the parameters in float32. A fault in the middle of it leaves some members levelled and
        others not: what is then sent twice or not at all is of the order of one residual.
        """
        count = torch.tensor([float(active)], device=group.seat.device)
        works = [group.all_reduce(count)]
        sums: dict[int, Tensor] = {}
        for number, (layout, memory) in enumerate(zip(self._layouts, self._held, strict=True)):
            if layout.codec is not None and layout.codec.feedback:
                sums[number] = torch.zeros(layout.num_entries, device=layout.parameters[0].device)
                if memory.residual is not None:
                    sums[number].copy_(memory.residual)
                works.append(group.all_reduce(sums[number]))
        for work in works:
            work.wait()
        for number, total in sums.items():
            self._held[number] = Memory(total / count if active else None, self._held[number].state)
        return int(count.item())

    def state(self) -> dict[str, Tensor]:
        """The codecs' states, the same on every member, by name."""
        return {
            f"{_STATE}{number}/{index}": tensor
            for number, memory in enumerate(self._held)
            for index, tensor in enumerate(memory.state)
        }

    def residual(self) -> dict[str, Tensor]:
        """This worker's residual by parameter."""
        found: dict[str, Tensor] = {}
        for layout, memory in zip(self._layouts, self._held, strict=True):
            if memory.residual is not None:
                found |= {_RESIDUAL + n: v for n, v in zip(layout.names, layout.views(memory.residual), strict=True)}
        return found
