"""A vector in rows, a payload for each: what a compressed collective encodes, sums and decodes at a time.

Row r is of member r. What a codec does with one vector is done here with all rows in one call where it is compiled, and
else row by row, with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shoal.codecs.blockwise import Blockwise, Form
from shoal.codecs.codec import Codec
from shoal.codecs.device import compiled_rows
from shoal.codecs.feedback import keep_residual
from shoal.codecs.noise import subkey

_ALIGNED = 1024
"""Rows are multiples of so many entries, which every codec's blocks divide."""


@dataclass(frozen=True)
class Cut:
    """``num_entries`` in ``num_rows`` rows of ``row`` entries; the last ones may be shorter, or empty."""

    num_entries: int
    num_rows: int

    @property
    def row(self) -> int:
        return -(-self.num_entries // (self.num_rows * _ALIGNED)) * _ALIGNED

    def part(self, number: int) -> slice:
        """Where a row lies."""
        return slice(min(number * self.row, self.num_entries), min((number + 1) * self.row, self.num_entries))


class Rows(Protocol):
    """Payloads lie in the rows of a contiguous tensor (num_rows, ``payload_bytes``) uint8. ``room`` (n,) and
    ``residual`` (n,) float32 are of the whole vector; None: none is wanted, there is none."""

    payload_bytes: int

    def encode(
        self, vector: Tensor, payloads: Tensor, own: int, key: int, residual: Tensor | None, room: Tensor | None
    ) -> None:
        """Add the residual to ``vector`` (n,) float32, encode all rows but ``own``, leave what is lost in ``room``."""
        ...

    def sum(self, vector: Tensor, received: Tensor, own: int, key: int, payload: Tensor, room: Tensor | None) -> None:
        """Add what the other members encoded of row ``own``, and encode the sum; what that loses goes to ``room``."""
        ...

    def decode(self, payloads: Tensor, key: int, vector: Tensor) -> None:
        """Write the sums of all rows into ``vector``."""
        ...


def rows_for(codec: Codec, cut: Cut, device: str) -> Rows:
    """How a vector's rows are dealt with on a device. ``codec`` is that of the whole vector."""
    if isinstance(codec, Blockwise) and device == "cpu":
        return _Together(codec.form, cut)
    return _Each(codec, cut)


def _key(key: int, member: int, num_members: int, *, sums: bool) -> int:
    """What a member encodes with: the parts that it sends, and the sum that it makes."""
    return subkey(key, member + num_members * sums)


class _Each:
    """Row by row."""

    def __init__(self, codec: Codec, cut: Cut) -> None:
        self._cut = cut
        self._parts = [cut.part(number) for number in range(cut.num_rows)]
        sizes = [part.stop - part.start for part in self._parts]
        self._codecs = [codec.share(size, cut.num_entries) if size else codec for size in sizes]
        self._sizes = [c.payload_bytes(size) if size else 0 for c, size in zip(self._codecs, sizes, strict=True)]
        self.payload_bytes = max(self._sizes)

    def encode(
        self, vector: Tensor, payloads: Tensor, own: int, key: int, residual: Tensor | None, room: Tensor | None
    ) -> None:
        if residual is not None:
            vector.add_(residual)
        key = _key(key, own, self._cut.num_rows, sums=False)
        for number in range(self._cut.num_rows):
            if number != own:
                self._encode(number, vector, payloads[number], key, room)

    def _encode(self, number: int, vector: Tensor, payload: Tensor, key: int, room: Tensor | None) -> None:
        part, codec = self._parts[number], self._codecs[number]
        if part.start < part.stop:
            out = payload[: self._sizes[number]]
            codec.encode(vector[part], key, out)
            if room is not None:
                keep_residual(codec, vector[part], out, key, room[part])

    def sum(self, vector: Tensor, received: Tensor, own: int, key: int, payload: Tensor, room: Tensor | None) -> None:
        part, size, count = self._parts[own], self._sizes[own], self._cut.num_rows
        if part.start < part.stop:
            for number in range(count):
                if number != own:
                    theirs = _key(key, number, count, sums=False)
                    self._codecs[own].decode(received[number][:size], theirs, vector[part], add=True)
            self._encode(own, vector, payload, _key(key, own, count, sums=True), room)

    def decode(self, payloads: Tensor, key: int, vector: Tensor) -> None:
        count = self._cut.num_rows
        for number, part in enumerate(self._parts):
            if part.start < part.stop:
                payload = payloads[number][: self._sizes[number]]
                self._codecs[number].decode(payload, _key(key, number, count, sums=True), vector[part])


class _Together:
    """All rows in one compiled call."""

    def __init__(self, form: Form, cut: Cut) -> None:
        self._form, self._cut = form, cut
        self.payload_bytes = form.layout(min(cut.row, cut.num_entries)).payload_bytes

    def encode(
        self, vector: Tensor, payloads: Tensor, own: int, key: int, residual: Tensor | None, room: Tensor | None
    ) -> None:
        form = self._keyed(_key(key, own, self._cut.num_rows, sums=False))
        arrays = vector.numpy(), payloads.numpy()
        compiled_rows().encode_rows(form, *arrays, (self._cut.row, own), _array(residual), _array(room))

    def sum(self, vector: Tensor, received: Tensor, own: int, key: int, payload: Tensor, room: Tensor | None) -> None:
        part = self._cut.part(own)
        form = self._keyed(_key(key, own, self._cut.num_rows, sums=True))
        arrays = vector.numpy()[part], received.numpy()
        compiled_rows().sum_rows(form, *arrays, own, payload.numpy(), _array(room)[part])

    def decode(self, payloads: Tensor, key: int, vector: Tensor) -> None:
        form = (self._form.bits, self._form.block, None)
        compiled_rows().decode_rows(form, payloads.numpy(), self._cut.row, vector.numpy())

    def _keyed(self, key: int) -> tuple[Any, ...]:
        return self._form.bits, self._form.block, self._form.words(key)


_NONE: Any = np.empty(0, np.float32)


def _array(tensor: Tensor | None) -> Any:
    return _NONE if tensor is None else tensor.numpy()


def warm_up_rows(codec: Codec, num_entries: int) -> None:
    """Have compiled what the codec's rows need, by an exchange of two members."""
    rows = rows_for(codec, Cut(num_entries, 2), "cpu")
    vectors, room = [torch.ones(num_entries) for _ in range(2)], torch.zeros(num_entries)
    sent = torch.zeros(2, 2, rows.payload_bytes, dtype=torch.uint8)
    sums = torch.zeros(2, rows.payload_bytes, dtype=torch.uint8)
    for own in range(2):
        rows.encode(vectors[own], sent[own], own, 0, None, room)
    for own in range(2):
        rows.sum(vectors[own], sent[:, own].contiguous(), own, 0, sums[own], room)
    rows.decode(sums, 0, vectors[0])
