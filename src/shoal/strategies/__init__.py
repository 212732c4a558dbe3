"""How what the lanes computed becomes the next version."""

from shoal.strategies.allreduce import Agreed, AllReduce, Reducer, Share

__all__ = ["Agreed", "AllReduce", "Reducer", "Share"]
