"""Payloads of codecs that give every block of entries a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, float32

from shoal.codecs.codec import ALIGNMENT, check_decoded, check_payload, floats, padded, payload_for
from shoal.codecs.device import run
from shoal.codecs.noise import Words, words
from shoal.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Scales (ceil(n / block),) float32, codes of ``bits`` bits an entry, zeros up to a multiple of 8 bytes."""

    bits: int
    block: int
    num_entries: int

    @property
    def scale_bytes(self) -> int:
        """Four a block."""
        return 4 * -(-self.num_entries // self.block)

    @property
    def code_bytes(self) -> int:
        """Without the zeros."""
        return -(-self.num_entries * self.bits // 8)

    @property
    def payload_bytes(self) -> int:
        """All of it."""
        return padded(self.scale_bytes + self.code_bytes)

    def split(self, payload: Tensor) -> tuple[Any, Any]:
        """The scales and the codes: of a payload on a CPU as arrays, which are cut in a tenth of the time."""
        whole: Any = payload.numpy() if payload.device.type == "cpu" else payload
        end = self.scale_bytes
        return whole[:end].view(np.float32 if payload.device.type == "cpu" else float32), whole[
            end : end + self.code_bytes
        ]


@dataclass(frozen=True)
class Form:
    """How a codec lays out its payloads. ``bits`` tells which codec it is, too: no two have the same."""

    bits: int
    block: int
    stochastic: bool = False

    def layout(self, num_entries: int) -> Layout:
        """Of a vector's payload."""
        return Layout(self.bits, self.block, num_entries)

    def words(self, key: int) -> Words | None:
        """What randomness comes from, if there is any."""
        return words(key) if self.stochastic else None


@runtime_checkable
class Blockwise(Protocol):
    """A codec of this kind."""

    @property
    def form(self) -> Form:
        """How its payloads lie."""
        ...


def encode(loop: str, layout: Layout, vector: Tensor, out: Tensor | None, *options: object) -> Tensor:
    """A codec's ``encode`` with the named loop."""
    payload = payload_for(vector, layout.payload_bytes, out)
    scales, codes = layout.split(payload)
    run(loop, floats(vector), scales, codes, layout.block, *options)
    if layout.payload_bytes > layout.scale_bytes + layout.code_bytes:
        payload[layout.scale_bytes + layout.code_bytes :].zero_()
    return payload


def decode(loop: str, layout: Layout, payload: Tensor, out: Tensor, add: bool) -> None:
    """A codec's ``decode`` with the named loop."""
    check_payload(payload, layout.payload_bytes)
    check_decoded(out)
    run(loop, *layout.split(payload), layout.block, out, add)


def check_block(codec: object, block: int) -> None:
    """ConfigError unless it is a power of two that fills whole bytes, up to 2**20."""
    if block not in {2**e for e in range(3, 21)}:
        raise ConfigError(f"a block must be a power of two from {ALIGNMENT} to {2**20} entries: {codec}")
