"""Sparse tables: from int64 ids to rows of weights with their optimizer's slots. In memory, without a network.

What a table is to be is here, and light; ``Table`` itself, with its compiled loops, is in ``shoal.tables.table``.
"""

from shoal.tables.image import Image
from shoal.tables.rules import FTRL, SGD, Adagrad, Adam, Rule
from shoal.tables.spec import NUM_BUCKETS, TableSpec

__all__ = ["FTRL", "NUM_BUCKETS", "SGD", "Adagrad", "Adam", "Image", "Rule", "TableSpec"]
