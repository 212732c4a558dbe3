"""Rows that tests know by heart, in every form that a source can be made of, and the slow obvious twin of reading."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from shoal.lanes import Part
from shoal.sources import Batch, Source

NUM_ROWS = 47
POINTS = np.arange(NUM_ROWS * 3, dtype=np.float32).reshape(NUM_ROWS, 3)
LABELS = np.arange(NUM_ROWS, dtype=np.int64) * 10


def table(start: int = 0, stop: int = NUM_ROWS) -> pa.Table:
    points = pa.FixedSizeListArray.from_arrays(pa.array(POINTS[start:stop].reshape(-1)), 3)
    words = pa.array([f"row {row}" for row in range(start, stop)])
    return pa.table({"point": points, "label": pa.array(LABELS[start:stop]), "words": words})


def write(folder: Path, cuts: Sequence[int] = (0, 20, 21, NUM_ROWS), rows_a_group: int = 8) -> Path:
    """Files ``0.parquet`` and on, one for each stretch between two cuts; row groups of several sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (start, stop) in enumerate(pairwise(cuts)):
        pq.write_table(table(start, stop), folder / f"{index}.parquet", row_group_size=rows_a_group)
    return folder


def decode(rows: pa.Table) -> Batch:
    """As a user might: from text to numbers, and a tuple."""
    labels = [int(words.removeprefix("row ")) * 10 for words in rows["words"].to_pylist()]
    return torch.tensor(np.stack(rows["point"].to_pylist()), dtype=torch.float32), torch.tensor(labels)


def twin(source: Source, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Points and labels, looked up one by one."""
    sizes = source.block_sizes()
    rows = [sum(sizes[: part.block]) + int(row) for part in parts for row in part.rows]
    return torch.from_numpy(POINTS[rows]), torch.from_numpy(LABELS[rows])


def columns(batch: Any) -> tuple[Tensor, Tensor]:
    """Points and labels of a batch of either kind."""
    return (batch["point"], batch["label"]) if isinstance(batch, dict) else batch


def same(batch: Any, other: tuple[Tensor, Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(columns(batch), other, strict=True))
