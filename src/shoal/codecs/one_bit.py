"""One bit an entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.codecs import blockwise
from shoal.codecs.codec import check_vector, floats
from shoal.codecs.device import run


@dataclass(frozen=True, kw_only=True)
class OneBit:
    """Send the signs, and each block's mean magnitude; keep the rest for the next step.

    Wire:   n / 8 + 4 ceil(n / block) bytes, against 4n: 31 times less with blocks of 1024.
    Signs with error feedback as in 1-bit SGD (Seide et al. 2014), scaled by the mean magnitude as in EF-signSGD
    (Karimireddy et al. 2019, arXiv:1901.09847, Algorithm 1, where the scale is that of a whole layer). 1-bit Adam (Tang
    et al. 2021, arXiv:2102.02888) compresses momentum so; here it is whatever vector it is given. Zero counts as
    positive, or as negative if its sign is.
    A block whose magnitudes do not sum to a finite number decodes to NaN, all of it; one whose mean is below 2**-119 to
    zeros.
    """

    block: int = 1024
    feedback: bool = True

    def __post_init__(self) -> None:
        blockwise.check_block(self, self.block)

    @property
    def form(self) -> blockwise.Form:
        """How its payloads lie."""
        return blockwise.Form(1, self.block)

    def check(self, dtype: torch.dtype, num_entries: int) -> None:
        check_vector(self, dtype, num_entries)

    def share(self, num_entries: int, total: int) -> OneBit:
        return self

    def payload_bytes(self, num_entries: int) -> int:
        return self.form.layout(num_entries).payload_bytes

    def encode(self, vector: Tensor, key: int, out: Tensor | None = None) -> Tensor:
        return blockwise.encode("one_bit_encode", self.form.layout(vector.numel()), vector, out)

    def decode(self, payload: Tensor, key: int, out: Tensor, *, add: bool = False) -> None:
        blockwise.decode("one_bit_decode", self.form.layout(out.numel()), payload, out, add)

    def keep(self, vector: Tensor, payload: Tensor, out: Tensor) -> None:
        """``keep_residual`` in one pass."""
        layout = self.form.layout(out.numel())
        run("one_bit_keep", floats(vector), *layout.split(payload), layout.block, out)
