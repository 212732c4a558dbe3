"""Linear algebra with the same bits on every machine: elementwise operations in a fixed order, and nothing else.

Libraries for it sum in an order that depends on the processor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.codecs.device import run


def tree_sum(rows: Tensor) -> Tensor:
    """The sum (c,) float64 of (r, c) float64 over rows, by halves."""
    sums = rows.new_empty(rows.shape[1])
    run("tree_sum", rows.contiguous(), sums)
    return sums


def orthogonal(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of (rows, r), as float32.

    Gram-Schmidt, twice for each column. A column that depends on those before it becomes zero; one that is not finite
    makes all from it on NaN.
    """
    columns = _unit(matrix.to(torch.float64))
    for j in range(1, columns.shape[1]):
        before, column = columns[:, :j], columns[:, j : j + 1]
        for _ in range(2):
            column = column - tree_sum((before * tree_sum(before * column)).T).view(-1, 1)
        rest = tree_sum(column.square()).sqrt()
        columns[:, j : j + 1] = torch.where(rest < 1e-8, 0, column / rest)
    return columns.to(torch.float32)


def outer_sum(p: Tensor, q: Tensor, out: Tensor) -> None:
    """Write p q^T to ``out`` (rows, columns), of (rows, r) and (columns, r), all float32."""
    run("outer_sum", p.contiguous(), q.T.contiguous(), out)


def unit_or_new(columns: Tensor, new: Callable[[], Tensor]) -> Tensor:
    """Columns (rows, r) brought to length 1; one that is zero or not finite is replaced by its like in ``new()``."""
    unit = _unit(columns.to(torch.float64)).to(torch.float32)
    alive = unit.isfinite().all(0) & (unit != 0).any(0)
    return unit if alive.all() else torch.where(alive, unit, new().to(unit.device))


def _unit(columns: Tensor) -> Tensor:
    """Columns of length 1, but for those that are zero."""
    scaled = columns / _or_one(columns.abs().amax(0))
    return scaled / _or_one(tree_sum(scaled.square()).sqrt())


def _or_one(divisors: Tensor) -> Tensor:
    return torch.where(divisors == 0, 1, divisors)
