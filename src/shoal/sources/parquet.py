"""Parquet files: row groups are the blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError
from shoal.lanes import Part
from shoal.sources.cache import BlockCache
from shoal.sources.columns import Columns, take
from shoal.sources.decoding import Decode, decode_numbers, decoded
from shoal.sources.files import File, find_files
from shoal.sources.source import Batch

_CACHED_BYTES = 512 << 20


@dataclass(frozen=True, eq=False)
class _Group:
    """Where a block is."""

    file: File
    index: int
    num_rows: int


class Parquet:
    """Rows of Parquet files. A worker reads only the row groups that its lanes touch, each about once an epoch.

    ``paths``: a file, a folder, a glob, or a list of them; local, or any fsspec URL such as ``s3://bucket/*.parquet``
    with ``storage_options``. ``columns``: those to read; by default all. ``decode`` turns one row group, a
    ``pyarrow.Table``, into a tuple or dict of tensors with a row each; by default numbers become tensors by column
    name, and lists of one fixed length become matrices. It is called in background threads.

    Memory: a worker holds the row groups that its lanes are in, decoded, and up to a quarter more that come next. That
    is at most 40 with 64 lanes (``Job.num_lanes``) on two workers: 400 MB if 10 MB each. They are what the samples are
    shuffled among. ``cached_bytes`` (512 MiB) bounds what is kept beside them, for the next epoch. For less, write
    smaller row groups, have fewer lanes or more workers.

    Footers are read here, all at once. ``ConfigError`` for files that are missing, no Parquet, or of other columns.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        columns: Sequence[str] | None = None,
        decode: Decode | None = None,
        *,
        storage_options: dict[str, Any] | None = None,
        cached_bytes: int = _CACHED_BYTES,
    ) -> None:
        if cached_bytes < 0:
            raise ConfigError(f"cached_bytes must be at least 0, not {cached_bytes}")
        self._given = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        self._columns = list(columns) if columns is not None else None
        self._decode = decode or decode_numbers
        self._cached_bytes = cached_bytes
        self._groups = tuple(
            _Group(file, index, file.footer.row_group(index).num_rows)
            for file in find_files(self._given, storage_options or {}, self._columns)
            for index in range(file.footer.num_row_groups)
        )

    def block_sizes(self) -> tuple[int, ...]:
        return tuple(group.num_rows for group in self._groups)

    def open(self) -> ParquetReader:
        return ParquetReader(self._groups, self._columns, self._decode, self._cached_bytes)

    def describe(self) -> dict[str, Any]:
        """Paths, columns and size; never the storage options, which may hold secrets."""
        return {
            "kind": "Parquet",
            "paths": self._given,
            "columns": self._columns,
            "num_files": len({group.file.path for group in self._groups}),
            "num_row_groups": len(self._groups),
            "num_rows": sum(group.num_rows for group in self._groups),
        }


class ParquetReader:
    """Reads and decodes row groups in background threads, each once while it is held or kept.

    ``StoreFault`` for what cannot be read, and asking again tries again; ``ConfigError`` for what decode cannot mean.
    """

    def __init__(self, groups: Sequence[_Group], columns: list[str] | None, decode: Decode, cached_bytes: int) -> None:
        self._groups = groups
        self._columns = columns
        self._decode = decode
        self._first: dict[str, tuple[str, str]] = {}
        self._cache = BlockCache(self._read, cached_bytes)

    def gather(self, parts: Sequence[Part]) -> Batch:
        blocks = self._cache.get(dict.fromkeys(part.block for part in parts))
        return take([blocks[part.block] for part in parts], [part.rows for part in parts])

    def expect(self, blocks: Collection[int]) -> None:
        self._cache.hold(blocks)

    def release(self, blocks: Collection[int]) -> None:
        self._cache.release(blocks)

    def close(self) -> None:
        self._cache.close()

    def _read(self, block: int) -> Columns:
        group = self._groups[block]
        where = f"row group {group.index} of {group.file.path}"
        columns = decoded(self._decode, group.file.read(group.index, self._columns), where)
        first_where, first_kind = self._first.setdefault("", (where, columns.kind()))
        if columns.kind() != first_kind:
            raise ConfigError(f"decode made ({columns.kind()}) of {where} and ({first_kind}) of {first_where}")
        return columns
