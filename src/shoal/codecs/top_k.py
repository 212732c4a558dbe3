"""The largest entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.codecs import sparse
from shoal.codecs.device import run
from shoal.errors import ConfigError


@dataclass(frozen=True)
class TopK:
    """Send the ``k`` entries of greatest magnitude; keep the rest for the next step.

    Shapes: vector (n,) -> values (k,) float32 and indices (k,) int32, by rising index.
    Wire:   8k bytes, against 4n.
    Biased; converges because what was kept back is added to the next vector (Stich et al. 2018, arXiv:1809.07599,
    Algorithm 1). Ties go to the lower index, which the paper leaves open. NaN counts as greater than infinity.
    """

    k: int
    feedback: bool = True

    def __post_init__(self) -> None:
        sparse.check_k(self, self.k)

    def check(self, dtype: torch.dtype, num_entries: int) -> None:
        sparse.check(self, dtype, num_entries)

    def share(self, num_entries: int, total: int) -> TopK:
        return TopK(sparse.share_of(self.k, num_entries, total), self.feedback)

    def payload_bytes(self, num_entries: int) -> int:
        return sparse.payload_bytes(self, num_entries)

    def encode(self, vector: Tensor, key: int, out: Tensor | None = None) -> Tensor:
        return sparse.encode(self, vector, key, out)

    def decode(self, payload: Tensor, key: int, out: Tensor, *, add: bool = False) -> None:
        sparse.decode(self, payload, key, out, add)

    def index_bytes(self, num_entries: int) -> int:
        return 4 * self.k

    def select(self, vector: Tensor, key: int, indices: Tensor) -> Tensor:
        self.check(vector.dtype, vector.numel())
        values = vector.new_empty(self.k)
        run("top_k", vector, values, indices.view(torch.int32))
        return values

    def scatter(self, values: Tensor, indices: Tensor, key: int, out: Tensor) -> None:
        at = indices.view(torch.int32)
        low, high = (int(bound) for bound in at.aminmax())
        if low < 0 or high >= out.numel():
            raise ConfigError(
                f"a payload names entries {low} to {high} of {out.numel()}: it is damaged, or another vector's"
            )
        out.index_add_(0, at, values)
