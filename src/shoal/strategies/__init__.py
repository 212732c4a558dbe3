"""How what the lanes computed becomes the next version."""

from shoal.strategies.agreed import Agreed, Share
from shoal.strategies.allreduce import AllReduce, Reducer
from shoal.strategies.hybrid import Hybrid
from shoal.strategies.local import DiLoCo, LocalSGD
from shoal.strategies.rounds import Rounds

Strategy = AllReduce | LocalSGD | DiLoCo | Hybrid
"""Any of them."""

__all__ = ["Agreed", "AllReduce", "DiLoCo", "Hybrid", "LocalSGD", "Reducer", "Rounds", "Share", "Strategy"]
