"""Sparse tables: from int64 ids to rows of weights with their optimizer's slots. In memory, without a network."""

from shoal.tables.image import Image
from shoal.tables.rules import FTRL, SGD, Adagrad, Adam, Rule
from shoal.tables.spec import NUM_BUCKETS, TableSpec
from shoal.tables.table import Stats, Table

__all__ = ["FTRL", "NUM_BUCKETS", "SGD", "Adagrad", "Adam", "Image", "Rule", "Stats", "Table", "TableSpec"]
