"""Embeddings whose rows are a table's: modules that take the place of torch's, and know any int64 id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag

from shoal.errors import ConfigError
from shoal.shards.foresight import Foresight, distinct_of
from shoal.tables import Adagrad, Rule, TableSpec
from shoal.tables.batches import distinct, sums
from shoal.tables.frame import Part
from shoal.tables.table import Table

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]


class TableOptions(TypedDict, total=False):
    """See ``TableSpec``."""

    initial_scale: float
    seed: int
    admit_after: int
    expire_after_s: int | None
    dtype: Literal["float32", "bfloat16"]


class RowSource(Protocol):
    """Where rows come from."""

    def pull(self, table: str, ids: Ids) -> Weights:
        """(n,) distinct ids -> (n, dim) float32."""
        ...


class OwnTables:
    """Rows of tables in this process: for a model by itself, without a run."""

    def __init__(self, specs: Sequence[TableSpec], memory_bytes: int | None = None) -> None:
        self.tables = {spec.name: Table(spec, memory_bytes) for spec in specs}

    def pull(self, table: str, ids: Ids) -> Weights:
        return self.tables[table].pull(ids)

    def push(self, parts: Sequence[Part]) -> None:
        """Take gradients."""
        for part in parts:
            self.tables[part.table].push(part.ids, part.gradients)


class _Rows(nn.Module):
    """What both modules have in common. Rows are no parameters: the table's own rule updates them, and they are not in
    the state dict."""

    def __init__(self, name: str, dim: int, optimizer: Rule | None, options: TableOptions) -> None:
        super().__init__()
        rule = Adagrad(lr=0.05) if optimizer is None else optimizer
        self.spec = TableSpec(name=name, dim=dim, rule=rule, **options)
        self.source: RowSource | None = None
        """Where its rows are; None: in a table of its own."""
        self.foresight: Foresight | None = None
        """What has rows come before they are asked for."""
        self._taken: list[tuple[Ids, Tensor]] = []

    def _gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) ids -> (m, dim) rows of the distinct ones, and (n,) the place of each id among them."""
        if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise ConfigError(f"embedding {self.spec.name}: ids must be int64, not {ids.dtype}")
        if self.source is None:
            self.source = OwnTables([self.spec])
        seen = self.foresight.find(self, self.spec.name, ids) if self.foresight is not None and self.training else None
        if seen is not None:
            unique, inverse, pulled = seen
        else:
            unique, inverse = distinct_of(ids)
            pulled = self.source.pull(self.spec.name, unique)
        rows = torch.from_numpy(pulled if pulled.flags.writeable else pulled.copy()).to(ids.device)
        if torch.is_grad_enabled() and self.training:
            rows.requires_grad_()
            self._taken.append((unique, rows))
        return rows, torch.from_numpy(inverse.astype(np.int64)).to(ids.device)

    def take_gradients(self) -> list[tuple[Ids, Weights]]:
        """What backward has left since the last time: ids and their gradients, for each forward."""
        taken, self._taken = self._taken, []
        return [(ids, rows.grad.cpu().numpy()) for ids, rows in taken if rows.grad is not None]

    def update(self) -> None:
        """Have the table of its own take the gradients: an optimizer's step. In a run that is done for it."""
        if not isinstance(self.source, OwnTables):
            raise ConfigError(f"embedding {self.spec.name} is part of a run, which updates it")
        self.source.push(summed(self.spec.name, self.take_gradients()))

    def extra_repr(self) -> str:
        return f"{self.spec.name!r}, {self.spec.dim}, {self.spec.rule}"


class Embedding(_Rows):
    """Rows by id, in place of ``torch.nn.Embedding``: ids of any shape (…) -> (…, dim) float32.

    Any int64 is an id, and the table holds those that were trained. ``optimizer`` is the table's rule. In a run modules
    of one name share a table. ``ConfigError`` for ids of another type.
    """

    def __init__(self, name: str, dim: int, optimizer: Rule | None = None, **options: Unpack[TableOptions]) -> None:
        super().__init__(name, dim, optimizer, options)

    def forward(self, ids: Tensor) -> Tensor:
        rows, places = self._gather(ids)
        return embedding(places.view(ids.shape), rows)


class EmbeddingBag(_Rows):
    """Sums or means of bags of rows, in place of ``torch.nn.EmbeddingBag``: (bags, n) ids, or (n,) ids and (bags,)
    ``offsets`` where each bag begins -> (bags, dim). An empty bag gives zeros.

    ``per_sample_weights``, as many as ids, are for ``mode="sum"``. ``ConfigError`` for offsets that do not rise from 0.
    """

    def __init__(
        self, name: str, dim: int, optimizer: Rule | None = None, mode: Literal["sum", "mean"] = "mean",
        **options: Unpack[TableOptions],
    ) -> None:  # fmt: skip
        if mode not in ("sum", "mean"):
            raise ConfigError(f"embedding {name}: mode must be 'sum' or 'mean', not {mode!r}")
        super().__init__(name, dim, optimizer, options)
        self.mode = mode

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        self._check(ids, offsets, per_sample_weights)
        rows, places = self._gather(ids)
        if not ids.numel():
            return rows.new_zeros(len(ids) if offsets is None else len(offsets), self.spec.dim)
        return embedding_bag(
            places.view(ids.shape), rows, None if offsets is None else offsets.long(), mode=self.mode,
            per_sample_weights=per_sample_weights,
        )  # fmt: skip

    def _check(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> None:
        name = self.spec.name
        if (ids.dim(), offsets is None) not in ((2, True), (1, False)):
            came = f"ids of shape {tuple(ids.shape)} {'without' if offsets is None else 'with'} offsets"
            raise ConfigError(f"embedding {name}: give (bags, n) ids, or (n,) ids with offsets, not {came}")
        if offsets is not None and len(offsets):
            falls = bool((offsets[1:] < offsets[:-1]).any())
            if int(offsets[0]) != 0 or falls or int(offsets[-1]) > len(ids):
                raise ConfigError(
                    f"embedding {name}: offsets must begin with 0, never fall, and end within the {len(ids)} ids"
                )
        if weights is not None and (self.mode != "sum" or weights.shape != ids.shape):
            raise ConfigError(f"embedding {name}: per_sample_weights are for mode='sum', one for each id")


def embeddings_of(model: nn.Module) -> list[_Rows]:
    """The modules of a model whose rows are a table's."""
    return [module for module in model.modules() if isinstance(module, _Rows)]


def specs_of(modules: Sequence[_Rows]) -> list[TableSpec]:
    """Their tables. ``ConfigError`` for two of one name that are not the same."""
    found: dict[str, TableSpec] = {}
    for module in modules:
        known = found.setdefault(module.spec.name, module.spec)
        if known != module.spec:
            raise ConfigError(f"two tables are called {known.name}: {known}, and {module.spec}")
    return list(found.values())


def summed(table: str, gradients: Sequence[tuple[Ids, Weights]]) -> list[Part]:
    """Gradients of several forwards as one part, each id once; none if there are none."""
    if not gradients:
        return []
    if len(gradients) == 1:
        ids, values = gradients[0]
        return [Part(table, ids, np.ascontiguousarray(values))] if len(ids) else []
    ids, inverse = distinct(np.concatenate([ids for ids, _ in gradients]))
    return [Part(table, ids, sums(np.concatenate([values for _, values in gradients]), inverse, len(ids)))]


def parts_of(modules: Sequence[_Rows]) -> list[Part]:
    """What backward has left in all of them, by table."""
    by_table: dict[str, list[tuple[Ids, Weights]]] = {}
    for module in modules:
        by_table.setdefault(module.spec.name, []).extend(module.take_gradients())
    return [part for table, gradients in by_table.items() for part in summed(table, gradients)]


__all__ = ["Embedding", "EmbeddingBag", "OwnTables", "embeddings_of", "parts_of", "specs_of"]
