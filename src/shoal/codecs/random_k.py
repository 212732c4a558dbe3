"""Entries chosen by lot."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.codecs import sparse
from shoal.codecs.codec import Shapes, State, Summed, floats
from shoal.codecs.noise import hash32, words


@dataclass(frozen=True)
class RandomK:
    """Send ``k`` entries that the key decides, on every member the same; keep the rest for the next step.

    Shapes: vector (n,) -> values (k,) float32, by rising index.
    Wire:   4k bytes, against 4n: the receiver knows the key, and so the indices. The sums of an all-reduce, too.
    With feedback, Stich et al. 2018 (arXiv:1809.07599, Algorithm 1 with rand-k). Without, every value is divided by its
    chance to be sent, so that the mean is right (Wangni et al. 2018, arXiv:1710.09854, with even chances). Deviation:
    one entry of each of ``k`` stretches, as even as can be, rather than any k: a lot that costs O(k), and leaves
    out no long stretch. If any entry of the vector is not finite, all that are sent are NaN.
    """

    k: int
    feedback: bool = True

    def __post_init__(self) -> None:
        sparse.check_k(self, self.k)

    def check(self, dtype: torch.dtype, num_entries: int) -> None:
        sparse.check(self, dtype, num_entries)

    def share(self, num_entries: int, total: int) -> RandomK:
        return RandomK(sparse.share_of(self.k, num_entries, total), self.feedback)

    def payload_bytes(self, num_entries: int) -> int:
        return sparse.payload_bytes(self, num_entries)

    def encode(self, vector: Tensor, key: int, out: Tensor | None = None) -> Tensor:
        return sparse.encode(self, vector, key, out)

    def decode(self, payload: Tensor, key: int, out: Tensor, *, add: bool = False) -> None:
        sparse.decode(self, payload, key, out, add)

    def index_bytes(self, num_entries: int) -> int:
        return 0

    def select(self, vector: Tensor, key: int, indices: Tensor) -> Tensor:
        self.check(vector.dtype, vector.numel())
        chosen, widths = self._chosen(vector.numel(), key, vector.device)
        values = vector[chosen] if self.feedback else vector[chosen] * widths
        low, high = vector.aminmax()
        return torch.where(low.isfinite() & high.isfinite(), values, torch.nan)

    def scatter(self, values: Tensor, indices: Tensor, key: int, out: Tensor) -> None:
        out.index_add_(0, self._chosen(out.numel(), key, out.device)[0], values)

    def init(self, shapes: Shapes) -> State:
        return ()

    def rounds(self, vector: Tensor, shapes: Shapes, state: State, key: int) -> Generator[Tensor, Tensor, Summed]:
        nothing = vector.new_empty(0, dtype=torch.uint8)
        values = self.select(floats(vector), key, nothing)
        own = torch.zeros_like(vector, dtype=torch.float32)
        total = torch.zeros_like(own)
        self.scatter(values, nothing, key, own)
        self.scatter((yield values), nothing, key, total)
        return Summed(total, own, state)

    def _chosen(self, num_entries: int, key: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The indices (k,) int64, rising, and of how many each was chosen."""
        number = torch.arange(self.k, device=device)
        starts = number * num_entries // self.k
        widths = (number + 1) * num_entries // self.k - starts
        offsets = hash32(number, words(key)) * widths >> 32
        return starts + offsets, widths
