"""Lanes: the order of samples, which step takes which, and who hosts what. Pure."""

from shoal.lanes.deal import deal
from shoal.lanes.ledger import Ledger
from shoal.lanes.order import Order, Part
from shoal.lanes.steps import Span, Steps

__all__ = ["Ledger", "Order", "Part", "Span", "Steps", "deal"]
