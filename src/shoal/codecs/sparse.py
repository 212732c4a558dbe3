"""What codecs that send some entries and drop the others have in common."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from shoal.codecs.codec import check_decoded, check_payload, check_vector, floats, padded, payload_for
from shoal.errors import ConfigError


@runtime_checkable
class Sparsifier(Protocol):
    """What chooses entries. Each is a ``Codec`` too, and may come before others in a ``Chain``."""

    @property
    def k(self) -> int:
        """How many entries are chosen."""
        ...

    def index_bytes(self, num_entries: int) -> int:
        """How many bytes tell which entries were chosen: a multiple of 4."""
        ...

    def select(self, vector: Tensor, key: int, indices: Tensor) -> Tensor:
        """The chosen values (k,) float32 of a vector (n,) float32; which they are is written to ``indices``, bytes."""
        ...

    def scatter(self, values: Tensor, indices: Tensor, key: int, out: Tensor) -> None:
        """Add the values to their entries of ``out`` (n,) float32. ConfigError if there are no such entries."""
        ...


def check_k(codec: object, k: int) -> None:
    """ConfigError unless there is at least one entry to send."""
    if k < 1:
        raise ConfigError(f"k must be at least 1 entry: {codec}")


def check(codec: Sparsifier, dtype: torch.dtype, num_entries: int) -> None:
    """A sparsifier's ``check``."""
    check_vector(codec, dtype, num_entries)
    if codec.k > num_entries:
        raise ConfigError(
            f"{codec} needs a vector of at least {codec.k} entries, not {num_entries}: choose a smaller k"
        )


def share_of(k: int, num_entries: int, total: int) -> int:
    """The k of a piece: in proportion, rounded up, at least 1."""
    return max(1, -(-k * num_entries // total))


def payload_bytes(codec: Sparsifier, num_entries: int) -> int:
    """A sparsifier's ``payload_bytes``."""
    return padded(4 * codec.k + codec.index_bytes(num_entries))


def encode(codec: Sparsifier, vector: Tensor, key: int, out: Tensor | None) -> Tensor:
    """A sparsifier's ``encode``: values float32, indices, zeros up to a multiple of 8 bytes."""
    num_values, end = 4 * codec.k, 4 * codec.k + codec.index_bytes(vector.numel())
    payload = payload_for(vector, padded(end), out)
    values = codec.select(floats(vector), key, payload[num_values:end])
    payload[:num_values].view(torch.float32).copy_(values)
    payload[end:].zero_()
    return payload


def decode(codec: Sparsifier, payload: Tensor, key: int, out: Tensor, add: bool) -> None:
    """A sparsifier's ``decode``."""
    check_decoded(out)
    check_payload(payload, payload_bytes(codec, out.numel()))
    num_values, end = 4 * codec.k, 4 * codec.k + codec.index_bytes(out.numel())
    if not add:
        out.zero_()
    codec.scatter(payload[:num_values].view(torch.float32), payload[num_values:end], key, out)
