"""Gradient compression: how a vector becomes few bytes, and back. Pure on tensors; who carries them is elsewhere."""

from shoal.codecs.cast import Cast
from shoal.codecs.chain import Chain
from shoal.codecs.codec import Codec, LinearCodec, State, Summed
from shoal.codecs.feedback import keep_residual
from shoal.codecs.int4 import Int4
from shoal.codecs.int8 import Int8
from shoal.codecs.one_bit import OneBit
from shoal.codecs.power_sgd import PowerSGD
from shoal.codecs.random_k import RandomK
from shoal.codecs.top_k import TopK
from shoal.codecs.warm_up import warm_up

__all__ = [
    "Cast", "Chain", "Codec", "Int4", "Int8", "LinearCodec", "OneBit", "PowerSGD", "RandomK", "State", "Summed", "TopK",
    "keep_residual", "warm_up",
]  # fmt: skip
