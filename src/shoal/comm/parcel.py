"""What one bucket of DistributedDataParallel's sends, and remembers of each of its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.codecs import Codec, LinearCodec
from shoal.comm.borrowed import Borrowed
from shoal.comm.exchange import Memory, Times, exchange_for
from shoal.errors import Bug

Kept = dict[str, Tensor]
"""``residual/NAME`` (n,) float32 of a parameter of n entries; ``codec/NAME/0`` and on, a linear codec's state."""


@dataclass(frozen=True)
class Contents:
    """The parameters of a bucket in their order, by name."""

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]

    @property
    def sizes(self) -> list[int]:
        return [parameter.numel() for parameter in self.parameters]

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it is these, in this order."""
        mine = self.parameters
        return len(mine) == len(parameters) and all(a is b for a, b in zip(mine, parameters, strict=True))


class Parcel:
    """One bucket's exchange and its memory, as its last one left it."""

    def __init__(self, borrowed: Borrowed, codec: Codec | None, contents: Contents, kept: Kept) -> None:
        """Takes what was kept of its parameters out of ``kept``."""
        self._borrowed, self._codec, self.contents = borrowed, codec, contents
        self._num_entries = sum(contents.sizes)
        shapes = tuple(tuple(parameter.shape) for parameter in contents.parameters)
        self._state_sizes = [len(codec.init((shape,))) if isinstance(codec, LinearCodec) else 0 for shape in shapes]
        self._device = torch.device(borrowed.seat.device)
        group, self._switch = borrowed.group()
        sent_with = codec if borrowed.seat.world_size > 1 else None
        self._exchange = exchange_for(group, sent_with, self._num_entries, shapes, Times())
        self._rooms: list[Tensor] = []
        self._memory = self._read(kept)

    # An exchange

    def start(self, flat: Tensor, key: int) -> None:
        """Begin to replace ``flat`` by its sum over all members."""
        self._flat = flat
        self._switch.current = self._borrowed.first
        self._exchange.start(flat, self._memory, key, self._room())
        self._switch.current = self._borrowed.second

    def turn(self) -> None:
        self._exchange.turn()

    def end(self) -> Tensor:
        """The sum. If it is not finite, what was not sent before is still not sent: a step that is to be skipped."""
        self._exchange.end()
        after = self._exchange.after
        if after is None:
            raise Bug("an exchange has ended and does not tell what it left")
        residual = after.residual
        if residual is not None:
            finite = self._flat.sum(dtype=torch.float32).isfinite()
            residual = self._chosen(finite, residual)
        self._memory = Memory(residual, after.state)
        return self._flat

    def _chosen(self, finite: Tensor, residual: Tensor) -> Tensor | None:
        before = self._memory.residual
        if not finite.is_cuda:
            return residual if finite else before
        # Without a wait for the device, which would hold up backward.
        return residual.copy_(torch.where(finite, residual, torch.zeros_like(residual) if before is None else before))

    def _room(self) -> Tensor | None:
        """A tensor for the next residual that does not hold the last."""
        if self._codec is None or not self._codec.feedback or self._borrowed.seat.world_size == 1:
            return None
        for room in self._rooms:
            if room is not self._memory.residual:
                return room
        self._rooms.append(torch.zeros(self._num_entries, device=self._device))
        return self._rooms[-1]

    # Parameter by parameter

    def kept(self) -> Kept:
        """Copies of what it remembers."""
        found: Kept = {}
        if self._memory.residual is not None:
            pieces = torch.split(self._memory.residual, self.contents.sizes)
            found |= {f"residual/{n}": piece.clone() for n, piece in zip(self.contents.names, pieces, strict=True)}
        state = list(self._memory.state)
        for name, count in zip(self.contents.names, self._state_sizes, strict=True):
            found |= {f"codec/{name}/{number}": state.pop(0).clone() for number in range(min(count, len(state)))}
        return found

    def _read(self, kept: Kept) -> Memory:
        return Memory(self._read_residual(kept), self._read_state(kept))

    def _read_residual(self, kept: Kept) -> Tensor | None:
        found = [kept.pop(f"residual/{name}", None) for name in self.contents.names]
        if all(piece is None for piece in found):
            return None
        pairs = zip(found, self.contents.sizes, strict=True)
        pieces = [torch.zeros(size) if piece is None else piece for piece, size in pairs]
        self._rooms.append(torch.cat([piece.to(self._device, torch.float32) for piece in pieces]))
        return self._rooms[-1]

    def _read_state(self, kept: Kept) -> tuple[Tensor, ...]:
        """All of the state, or nothing: the codec then begins anew."""
        pairs = zip(self.contents.names, self._state_sizes, strict=True)
        names = [f"codec/{name}/{number}" for name, count in pairs for number in range(count)]
        found = [kept.pop(name, None) for name in names]
        state = tuple(piece.to(self._device) for piece in found if piece is not None)
        return state if len(state) == len(found) else ()
