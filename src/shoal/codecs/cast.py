"""Two bytes an entry."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.codecs.codec import Shapes, State, Summed, check_decoded, check_payload, check_vector, padded, payload_for
from shoal.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cast:
    """Send every entry as bfloat16, or as float16, rounded to nearest, ties to even.

    Wire:   2n bytes, against 4n.
    bfloat16 holds all magnitudes that float32 does, to 3 digits; float16 holds 6e-8 to 65504, to 4, and sends what is
    greater as infinity. In an all-reduce the sums are rounded, too. No feedback unless asked for: the error is below
    0.4 % of each entry.
    """

    dtype: str = "bf16"
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"Cast needs a dtype among {', '.join(DTYPES)}, not {self.dtype!r}")

    def check(self, dtype: torch.dtype, num_entries: int) -> None:
        check_vector(self, dtype, num_entries)

    def share(self, num_entries: int, total: int) -> Cast:
        return self

    def payload_bytes(self, num_entries: int) -> int:
        return padded(2 * num_entries)

    def encode(self, vector: Tensor, key: int, out: Tensor | None = None) -> Tensor:
        n = vector.numel()
        payload = payload_for(vector, self.payload_bytes(n), out)
        payload[: 2 * n].view(DTYPES[self.dtype]).copy_(vector.detach())
        payload[2 * n :].zero_()
        return payload

    def decode(self, payload: Tensor, key: int, out: Tensor, *, add: bool = False) -> None:
        check_decoded(out)
        check_payload(payload, self.payload_bytes(out.numel()))
        entries = payload[: 2 * out.numel()].view(DTYPES[self.dtype])
        out.add_(entries) if add else out.copy_(entries)

    def init(self, shapes: Shapes) -> State:
        return ()

    def rounds(self, vector: Tensor, shapes: Shapes, state: State, key: int) -> Generator[Tensor, Tensor, Summed]:
        entries = vector.detach().to(DTYPES[self.dtype], copy=True)
        own = entries.to(torch.float32)
        total = yield entries
        return Summed(total.to(torch.float32), own, state)
