"""A package's sparse tables: written from images, and read by a model's embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.errors import ConfigError
from shoal.shards.embedding import OwnTables, embeddings_of
from shoal.tables.image import Image
from shoal.tables.table import Table


def attach(model: nn.Module, metas: Sequence[Mapping[str, Any]], arrays: Sequence[Mapping[str, Tensor]]) -> None:
    """Have a model's embeddings read these tables. ``ConfigError`` if one that they need is not among them, or is of
    another kind."""
    tables = OwnTables([])
    for meta, named in zip(metas, arrays, strict=True):
        image = Image.of(meta, {name: tensor.numpy() for name, tensor in named.items()})
        table = tables.tables[image.spec.name] = Table(image.spec)
        table.apply(image)
    for module in embeddings_of(model):
        known = tables.tables.get(module.spec.name)
        if known is None or known.spec != module.spec:
            came = "none of that name" if known is None else f"{known.spec}"
            raise ConfigError(f"the model reads the table {module.spec}, and the package has {came}")
        module.source = tables


def whole(parts: Sequence[Table]) -> Image:
    """A table's parts, which have no id in common, as one image."""
    images = [part.image() for part in parts]
    joined: dict[str, Any] = {
        name: np.concatenate([image.arrays()[name] for image in images]) for name in images[0].arrays()
    }
    return replace(images[0], clock=max(image.clock for image in images), **joined).by_id()


def stored(image: Image) -> dict[str, Tensor]:
    """Its arrays, as tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in image.arrays().items()}
