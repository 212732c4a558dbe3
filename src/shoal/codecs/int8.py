"""One byte an entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.codecs import blockwise
from shoal.codecs.codec import check_vector


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Round every entry to one of 255 levels between plus and minus its block's greatest magnitude.

    Wire:   n + 4 ceil(n / block) bytes, against 4n: 3.94 times less with blocks of 256.
    Blockwise absolute maxima as in 8-bit optimizers (Dettmers et al. 2022, arXiv:2110.02861, section 2), with even
    levels rather than their quantile map: decoding is one multiplication, and gradients carry no state whose small
    entries would matter as an optimizer's do. Rounds to nearest, ties to even; ``stochastic=True`` rounds up or down at
    random so that the mean is right (QSGD: Alistarh et al. 2017, arXiv:1610.02132, section 3.1, whose norm is the
    Euclidean one and not the greatest magnitude).

    No feedback unless asked for: the error is below 1 % of a Gaussian gradient, far below the noise of a batch, and a
    residual costs the memory of a gradient on each member, to be committed and to be healed.
    A block that holds a number that is not finite decodes to NaN, all of it; one below 2**-119 to zeros.
    """

    block: int = 256
    stochastic: bool = False
    feedback: bool = False

    def __post_init__(self) -> None:
        blockwise.check_block(self, self.block)

    @property
    def form(self) -> blockwise.Form:
        """How its payloads lie."""
        return blockwise.Form(8, self.block, self.stochastic)

    def check(self, dtype: torch.dtype, num_entries: int) -> None:
        check_vector(self, dtype, num_entries)

    def share(self, num_entries: int, total: int) -> Int8:
        return self

    def payload_bytes(self, num_entries: int) -> int:
        return self.form.layout(num_entries).payload_bytes

    def encode(self, vector: Tensor, key: int, out: Tensor | None = None) -> Tensor:
        form = self.form
        return blockwise.encode("int8_encode", form.layout(vector.numel()), vector, out, form.words(key))

    def decode(self, payload: Tensor, key: int, out: Tensor, *, add: bool = False) -> None:
        blockwise.decode("int8_decode", self.form.layout(out.numel()), payload, out, add)
