"""What a codec is: a value that turns a vector of gradients into bytes of a known length, and back."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from shoal.errors import ConfigError

State = tuple[Tensor, ...]
"""What a linear codec remembers from one step to the next."""

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of the parameters that lie side by side in a vector, in their order."""

ALIGNMENT = 8
"""Every payload's length is a multiple of this, and every payload begins at one in its storage."""

MOST_ENTRIES = 2**31 - 1
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@runtime_checkable
class Codec(Protocol):
    """How a vector travels. Its methods are pure: all randomness comes from ``key``, an integer of 64 bits.

    The same vector and key make the same payload, and the same payload and key the same floats, bit for bit, on every
    machine. What of a vector is not a finite number decodes to what is none.
    """

    @property
    def feedback(self) -> bool:
        """Whether what was not sent is to be kept and added to the next vector (error feedback)."""
        ...

    def check(self, dtype: torch.dtype, num_entries: int) -> None:
        """ConfigError if it cannot take a vector of so many entries of this type."""
        ...

    def share(self, num_entries: int, total: int) -> Codec:
        """The codec for a piece of ``num_entries`` of a vector of ``total`` entries."""
        ...

    def payload_bytes(self, num_entries: int) -> int:
        """The length of such a vector's payload: a multiple of 8."""
        ...

    def encode(self, vector: Tensor, key: int, out: Tensor | None = None) -> Tensor:
        """The payload (``payload_bytes(n)``,) uint8 of a vector (n,) of floats, on its device; ``vector`` is only read.

        It is written into ``out`` if that is given: contiguous, and at an offset in its storage that 8 divides, as a
        row of a (world_size, ``payload_bytes(n)``) buffer is.
        """
        ...

    def decode(self, payload: Tensor, key: int, out: Tensor, *, add: bool = False) -> None:
        """Write the decoded vector into ``out`` (n,) float32, contiguous; or add it to that.

        ``payload`` lies as ``encode``'s ``out`` does.
        """
        ...


@dataclass(frozen=True)
class Summed:
    """What the members' vectors came to: ``total`` (n,) float32, of which ``own`` (n,) float32 came from this member.

    ``total`` and ``state`` have the same bits on every member. The members' ``own`` sum to ``total``, up to the order
    of float sums.
    """

    total: Tensor
    own: Tensor
    state: State


@runtime_checkable
class LinearCodec(Codec, Protocol):
    """A codec whose payloads can be summed without being decoded, so that they can ride an all-reduce."""

    def init(self, shapes: Shapes) -> State:
        """The state before the first step, the same on every member."""
        ...

    def rounds(self, vector: Tensor, shapes: Shapes, state: State, key: int) -> Generator[Tensor, Tensor, Summed]:
        """Yield, once or more, a 1-D tensor of floats to be summed over all members, and be sent the sum.

        ``vector`` (n,) is only read. The sum may be the tensor that was yielded, summed in place. ``shapes``, ``state``
        and ``key`` are the same on every member.
        """
        ...


def check_vector(codec: object, dtype: torch.dtype, num_entries: int) -> None:
    """ConfigError unless it is a vector of float32, float16 or bfloat16, neither empty nor too long."""
    if dtype not in FLOATS:
        raise ConfigError(
            f"{codec} takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}: cast the model, or "
            "name the parameter in the strategy's `uncompressed`"
        )
    if not 1 <= num_entries <= MOST_ENTRIES:
        raise ConfigError(
            f"{codec} takes 1 to {MOST_ENTRIES} entries, not {num_entries}: split or leave out the vector"
        )


def padded(num_bytes: int) -> int:
    """The next multiple of 8."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def floats(vector: Tensor) -> Tensor:
    """A vector's entries as contiguous float32, without a copy if that is what they are."""
    return vector.detach().to(torch.float32).contiguous()


def payload_for(vector: Tensor, num_bytes: int, out: Tensor | None) -> Tensor:
    """``out`` if it can hold the payload, else a new one; ConfigError if it cannot."""
    if out is None:
        return torch.empty(num_bytes, dtype=torch.uint8, device=vector.device)
    check_payload(out, num_bytes)
    return out


def check_payload(payload: Tensor, num_bytes: int) -> None:
    """ConfigError unless it is ``num_bytes`` contiguous bytes at a multiple of 8."""
    if payload.dtype != torch.uint8 or payload.shape != (num_bytes,) or not payload.is_contiguous():
        raise ConfigError(
            f"a payload of ({num_bytes},) contiguous torch.uint8 is needed, not one of {tuple(payload.shape)} "
            f"{payload.dtype}: both sides must use the same codec on vectors of the same size"
        )
    if payload.storage_offset() % ALIGNMENT:
        raise ConfigError(
            f"a payload must begin at a multiple of {ALIGNMENT} bytes, not at {payload.storage_offset()}: "
            "payload_bytes() is one, so lay payloads side by side"
        )


def check_decoded(out: Tensor) -> None:
    """ConfigError unless it is a contiguous vector of float32."""
    if out.dtype != torch.float32 or out.ndim != 1 or not out.is_contiguous():
        raise ConfigError(
            f"decoding needs a contiguous vector of torch.float32 to write to, not {tuple(out.shape)} {out.dtype}"
        )
