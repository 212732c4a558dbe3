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

    Shapes: vector (n,) -> values (k,) float32 and indices (k,), by rising index.
    Wire:   8k bytes, against 4n; or 6k + 4 ceil(n / 65536) if that is less: only the lower 16 bits of an index are
            sent, and how many indices share the upper ones.
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
        return min(4 * self.k, self._packed_bytes(num_entries))

    def select(self, vector: Tensor, key: int, indices: Tensor) -> Tensor:
        self.check(vector.dtype, vector.numel())
        values = vector.new_empty(self.k)
        chosen = torch.empty(self.k, dtype=torch.int32, device=vector.device)
        run("top_k", vector, values, chosen)
        if self._packs(vector.numel()):
            sections = _num_sections(vector.numel())
            counts, lower = indices[: 4 * sections], indices[4 * sections :]
            counts.view(torch.int32).copy_(torch.bincount(chosen >> 16, minlength=sections))
            lower[2 * self.k :].zero_()
            lower[: 2 * self.k].view(torch.uint16).copy_(chosen & 0xFFFF)
        else:
            indices.view(torch.int32).copy_(chosen)
        return values

    def scatter(self, values: Tensor, indices: Tensor, key: int, out: Tensor) -> None:
        out.index_add_(0, self._unpacked(indices, out.numel()), values)

    def _packed_bytes(self, num_entries: int) -> int:
        return 4 * _num_sections(num_entries) + -(-self.k // 2) * 4

    def _packs(self, num_entries: int) -> bool:
        return self._packed_bytes(num_entries) < 4 * self.k

    def _unpacked(self, indices: Tensor, num_entries: int) -> Tensor:
        """The indices (k,); ConfigError if one is not an entry."""
        chosen = indices.view(torch.int32)
        if self._packs(num_entries):
            sections = _num_sections(num_entries)
            counts, lower = chosen[:sections], indices[4 * sections :][: 2 * self.k]
            if int(counts.min()) < 0 or int(counts.sum()) != self.k:
                raise ConfigError(f"{self} got indices that do not add up: the payload is damaged, or another codec's")
            upper = torch.arange(sections, dtype=torch.int32, device=indices.device).repeat_interleave(counts)
            chosen = (upper << 16) | lower.view(torch.uint16).to(torch.int32)
        low, high = (int(bound) for bound in chosen.aminmax())
        if low < 0 or high >= num_entries:
            raise ConfigError(
                f"{self} got entries {low} to {high} of {num_entries}: the payload is damaged, or another's"
            )
        return chosen


def _num_sections(num_entries: int) -> int:
    """Stretches of 65536 entries."""
    return -(-num_entries >> 16)
