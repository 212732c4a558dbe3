"""Every codec there is, for vectors of any size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.codecs import Cast, Chain, Codec, Int4, Int8, LinearCodec, OneBit, PowerSGD, RandomK, TopK

SIZES = (1, 2, 7, 8, 255, 256, 257, 1000, 4097)
KEY = 0x0123_4567_89AB_CDEF

Make = Callable[[int], Codec]
"""A codec that fits a vector of so many entries."""

CASES: dict[str, Make] = {
    "bf16": lambda n: Cast(),
    "fp16": lambda n: Cast("fp16"),
    "int8": lambda n: Int8(),
    "int8 at random": lambda n: Int8(stochastic=True, feedback=True),
    "int4": lambda n: Int4(),
    "int4 at random": lambda n: Int4(block=32, stochastic=True),
    "one bit": lambda n: OneBit(block=256),
    "top k": lambda n: TopK(-(-n // 10)),
    "random k": lambda n: RandomK(-(-n // 10)),
    "random k, unbiased": lambda n: RandomK(-(-n // 3), feedback=False),
    "power sgd": lambda n: PowerSGD(rank=3),
    "chain": lambda n: Chain(TopK(-(-n // 10)), Int8(block=64)),
    "chain of three": lambda n: Chain(RandomK(-(-n // 2)), TopK(-(-n // 5)), Int4()),
    "chain of one": lambda n: Chain(OneBit()),
}
LINEAR = {name: make for name, make in CASES.items() if isinstance(make(1), LinearCodec)}
WITH_FEEDBACK = {name: make for name, make in CASES.items() if make(1).feedback}
COMPILED = {name: make for name, make in CASES.items() if name == "power sgd" or name not in LINEAR}


def gradient(num_entries: int, seed: int = 0) -> Tensor:
    """Heavy-tailed, with some zeros."""
    rng = torch.Generator().manual_seed(seed)
    vector = torch.randn(num_entries, generator=rng) * torch.randn(num_entries, generator=rng).exp()
    return vector * (torch.rand(num_entries, generator=rng) > 0.1)


def decoded(codec: Codec, vector: Tensor, key: int = KEY) -> Tensor:
    """What a vector is after the way there and back."""
    out = torch.full((vector.numel(),), -7.0, device=vector.device)
    codec.decode(codec.encode(vector, key), key, out)
    return out


def same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN here."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
