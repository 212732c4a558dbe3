"""Error feedback: what was not sent is kept, and added to what is sent next.

Karimireddy et al. 2019 (arXiv:1901.09847, Algorithm 2). Who calls this holds the residual, and adds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.codecs.codec import Codec
from shoal.codecs.one_bit import OneBit


def keep_residual(codec: Codec, vector: Tensor, payload: Tensor, key: int, out: Tensor) -> None:
    """Write ``vector`` less what ``payload`` decodes to into ``out`` (n,) float32: what ``encode`` left behind.

    Where the vector or what was decoded is not a finite number, neither is the residual: do not keep that.
    """
    if isinstance(codec, OneBit):
        codec.keep(vector, payload, out)
    else:
        codec.decode(payload, key, out)
        torch.sub(vector, out, out=out)
