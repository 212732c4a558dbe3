"""Table shards: processes that hold tables for many workers, and what workers ask them with."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def has_tables(model: nn.Module) -> bool:
    """Whether a model has embeddings of tables; without loading what those need, for no model without it has any."""
    module = sys.modules.get("shoal.shards.embedding")
    return module is not None and bool(module.embeddings_of(model))
