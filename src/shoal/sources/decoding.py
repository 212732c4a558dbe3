"""From a row group's columns to tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shoal.errors import ConfigError, ShoalError
from shoal.sources.columns import Columns
from shoal.sources.source import Batch

Decode = Callable[[Any], Batch]


def decode_numbers(table: Any) -> Batch:
    """Each column as a tensor by its name: numbers as (rows,), fixed-size lists of numbers as (rows, length).

    ``ConfigError`` for other columns, and for nulls.
    """
    out = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        array = column.combine_chunks()
        width = getattr(array.type, "list_size", None)
        if width is None:
            out[name] = _numbers(name, array, array)
        else:
            out[name] = _numbers(name, array, array.flatten()).reshape(len(array), width)
    return out


def _numbers(name: str, array: Any, flat: Any) -> torch.Tensor:
    import pyarrow as pa

    kind = flat.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ConfigError(f"column {name} is {array.type}, which is no number: choose columns, or give decode")
    if array.null_count or flat.null_count:
        raise ConfigError(f"column {name} has nulls: fill them, or give decode")
    return torch.from_numpy(np.array(flat.to_numpy(zero_copy_only=False)))


def decoded(decode: Decode, table: Any, where: str) -> Columns:
    """What ``decode`` makes of a row group. ``ConfigError`` if that is no batch with a row for each of its rows."""
    try:
        batch: object = decode(table)
    except ShoalError as error:
        raise ConfigError(f"{where}: {error}") from error
    except Exception as error:
        raise ConfigError(f"decode failed on {where}: {type(error).__name__}: {error}") from error
    tensors = tuple(batch.values()) if isinstance(batch, dict) else batch
    if not isinstance(tensors, tuple) or not tensors or not all(isinstance(t, torch.Tensor) for t in tensors):
        raise ConfigError(f"decode must return a tuple or dict of tensors, and it returned {_described(batch)}")
    for tensor in tensors:
        if tensor.ndim == 0 or len(tensor) != len(table):
            raise ConfigError(f"decode made {tuple(tensor.shape)} of {where}, which has {len(table)} rows")
    return Columns.of(batch)  # type: ignore[arg-type]


def _described(batch: object) -> str:
    inside = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else ()
    kinds = ", ".join(sorted({type(value).__name__ for value in inside}))
    return f"a {type(batch).__name__}" + (f" of {kinds}" if kinds else "")
