"""One codec after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from shoal.codecs.codec import Codec, check_decoded, check_payload, floats, padded, payload_for
from shoal.codecs.noise import subkey
from shoal.codecs.power_sgd import PowerSGD
from shoal.codecs.sparse import Sparsifier
from shoal.errors import ConfigError


@dataclass(frozen=True, init=False)
class Chain:
    """``Chain(TopK(1000), Int8())``: each codec takes the values that the one before it chose.

    All but the last choose entries (``TopK``, ``RandomK``).
    Wire:   the last one's payload of its k values, and before it the indices of each.
    What is lost on the whole way is fed back if one of the codecs feeds back. As Qsparse-local-SGD (Basu et al. 2019,
    arXiv:1906.02367), which quantizes what it chose, and gives back both losses.
    """

    codecs: tuple[Codec, ...]

    def __init__(self, *codecs: Codec) -> None:
        object.__setattr__(self, "codecs", codecs)
        if not codecs:
            raise ConfigError("Chain needs codecs, as in Chain(TopK(1000), Int8())")
        for codec in codecs[:-1]:
            if not isinstance(codec, Sparsifier):
                raise ConfigError(
                    f"in {self} only the last codec can be {codec}: the others must choose entries, as TopK and RandomK"
                )
        if len(codecs) > 1 and isinstance(codecs[-1], PowerSGD):
            raise ConfigError(f"in {self} the values that were chosen are no matrix, which {codecs[-1]} needs")

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.codecs))})"

    @property
    def feedback(self) -> bool:
        return any(codec.feedback for codec in self.codecs)

    def check(self, dtype: torch.dtype, num_entries: int) -> None:
        self.codecs[0].check(dtype, num_entries)
        if self._rest:
            self._rest.check(torch.float32, self._first.k)

    def share(self, num_entries: int, total: int) -> Chain:
        first = self.codecs[0].share(num_entries, total)
        if not self._rest:
            return Chain(first)
        return Chain(first, *self._rest.share(cast(Sparsifier, first).k, self._first.k).codecs)

    def payload_bytes(self, num_entries: int) -> int:
        if not self._rest:
            return self.codecs[0].payload_bytes(num_entries)
        return padded(self._first.index_bytes(num_entries)) + self._rest.payload_bytes(self._first.k)

    def encode(self, vector: Tensor, key: int, out: Tensor | None = None) -> Tensor:
        if not self._rest:
            return self.codecs[0].encode(vector, key, out)
        payload = payload_for(vector, self.payload_bytes(vector.numel()), out)
        num_indices = self._first.index_bytes(vector.numel())
        values = self._first.select(floats(vector), key, payload[:num_indices])
        payload[num_indices : padded(num_indices)].zero_()
        self._rest.encode(values, subkey(key, 1), payload[padded(num_indices) :])
        return payload

    def decode(self, payload: Tensor, key: int, out: Tensor, *, add: bool = False) -> None:
        if not self._rest:
            self.codecs[0].decode(payload, key, out, add=add)
            return
        check_decoded(out)
        check_payload(payload, self.payload_bytes(out.numel()))
        num_indices = self._first.index_bytes(out.numel())
        values = out.new_empty(self._first.k)
        self._rest.decode(payload[padded(num_indices) :], subkey(key, 1), values)
        if not add:
            out.zero_()
        self._first.scatter(values, payload[:num_indices], key, out)

    @property
    def _first(self) -> Sparsifier:
        return cast(Sparsifier, self.codecs[0])

    @property
    def _rest(self) -> Chain | None:
        return Chain(*self.codecs[1:]) if len(self.codecs) > 1 else None
