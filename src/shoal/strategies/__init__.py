"""How what the lanes computed becomes the next version."""

from shoal.strategies.agreed import Agreed, Share
from shoal.strategies.allreduce import AllReduce, Reducer
from shoal.strategies.hybrid import Hybrid
from shoal.strategies.local import DiLoCo, LocalSGD
from shoal.strategies.rounds import Rounds
from shoal.strategies.server import ParameterServer, Served

Strategy = AllReduce | LocalSGD | DiLoCo | Hybrid | ParameterServer
"""Any of them."""

__all__ = [
    "Agreed", "AllReduce", "DiLoCo", "Hybrid", "LocalSGD", "ParameterServer", "Reducer", "Rounds", "Served", "Share",
    "Strategy",
]  # fmt: skip
