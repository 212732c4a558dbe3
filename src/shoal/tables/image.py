"""What a table holds, as plain arrays: all of it, or what has changed since an earlier moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError
from shoal.tables.spec import TableSpec

Ids = npt.NDArray[np.int64]
EVERYTHING = -1

_ARRAYS = {
    "ids": np.int64, "counts": np.int32, "touched": np.uint32, "seen_at": np.int64, "rows": np.float32,
    "removed": np.int64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Image:
    """A table after its operation ``clock``, or what of it has changed after its operation ``since`` (-1: all of it).

    Shapes: ``ids``, ``touched`` and ``seen_at`` (n,), the latter (0,) in a table without expiry. ``counts`` (n,): 1 for
    an id with a row, -k for one that was pushed k times and has none. ``rows`` (number of ids with a row, words): bits,
    in the order of ids. ``removed``: ids to be taken away before the others are put.
    """

    spec: TableSpec
    since: int
    clock: int
    ids: Ids
    counts: npt.NDArray[np.int32]
    touched: npt.NDArray[np.uint32]
    seen_at: Ids
    rows: npt.NDArray[np.float32]
    removed: Ids

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What ``of`` takes, to be stored."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def meta(self) -> dict[str, Any]:
        """As JSON."""
        return {"spec": self.spec.record(), "since": self.since, "clock": self.clock}

    @staticmethod
    def of(meta: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Image:
        """What was stored. ``ConfigError`` if the arrays do not fit each other, or the spec."""
        spec = TableSpec.read(meta["spec"])
        image = Image(spec=spec, since=meta["since"], clock=meta["clock"], **{name: arrays[name] for name in _ARRAYS})
        num_ids, num_rows = len(image.ids), int((image.counts > 0).sum())
        shapes = {
            "ids": (num_ids,), "counts": (num_ids,), "touched": (num_ids,), "removed": (len(image.removed),),
            "seen_at": (num_ids if spec.expire_after_s else 0,), "rows": (num_rows, spec.num_words),
        }  # fmt: skip
        for name, array in image.arrays().items():
            if array.shape != shapes[name] or array.dtype != _ARRAYS[name]:
                came = f"{array.dtype} of shape {array.shape}"
                raise ConfigError(f"table {spec.name}: {name} was to be {shapes[name]}, and is {came}")
        return image

    def by_id(self) -> Image:
        """The same, in the order of ids: two tables that hold the same give equal arrays."""
        order = np.argsort(self.ids, kind="stable")
        own = self.counts > 0
        row_of = np.cumsum(own) - 1
        rows = self.rows[row_of[order][own[order]]]
        seen_at = self.seen_at[order] if len(self.seen_at) else self.seen_at
        return replace(
            self, ids=self.ids[order], counts=self.counts[order], touched=self.touched[order], seen_at=seen_at,
            rows=rows, removed=np.sort(self.removed),
        )  # fmt: skip

    def then(self, delta: Image) -> Image:
        """This and what came after it, as one (compaction). ``ConfigError`` if something is missing in between."""
        delta.check_follows(self.spec, self.clock)
        stays = ~np.isin(self.ids, delta.ids) & ~np.isin(self.ids, delta.removed)
        seen_at = np.concatenate([self.seen_at[stays], delta.seen_at]) if len(self.seen_at) else delta.seen_at
        removed = np.union1d(self.removed, delta.removed) if self.since != EVERYTHING else self.removed
        return replace(
            self, clock=delta.clock, seen_at=seen_at, removed=removed,
            ids=np.concatenate([self.ids[stays], delta.ids]),
            counts=np.concatenate([self.counts[stays], delta.counts]),
            touched=np.concatenate([self.touched[stays], delta.touched]),
            rows=np.concatenate([self.rows[stays[self.counts > 0]], delta.rows]),
        )  # fmt: skip

    def check_follows(self, spec: TableSpec, clock: int) -> None:
        """``ConfigError`` unless it can be put on top of a table of this spec at this moment."""
        if self.spec != spec:
            raise ConfigError(f"an image of {self.spec} is not one of {spec}")
        if self.since > clock or self.clock < clock:
            raise ConfigError(
                f"table {spec.name} is at operation {clock}, and the image leads from {self.since} to {self.clock}; "
                "a full image is needed"
            )
