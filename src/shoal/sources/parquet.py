"""Parquet files: row groups are the blocks, decoded once each and kept while there is room."""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.errors import ConfigError, StoreFault
from shoal.lanes import Part
from shoal.sources.source import Batch, joined, rows_of

Decode = Callable[[Any], Batch]

_FOOTER_READERS = 8
_GROUP_READERS = 2
_CACHED_BYTES = 512 << 20


@dataclass(frozen=True)
class _Group:
    """Where a block is: a file and its row group."""

    path: str
    index: int
    num_rows: int


class Parquet:
    """Rows of Parquet files. A worker reads only the row groups that its lanes touch.

    ``paths``: a file, a folder, a glob, or a list of files; local, or any fsspec URL such as ``s3://bucket/*.parquet``
    with ``storage_options``. ``columns``: those to read; by default all. ``decode`` turns one row group, a
    ``pyarrow.Table``, into a tuple or dict of tensors with a row each; by default numbers become tensors by column
    name, and lists of one fixed length become matrices. Decoded row groups are kept up to ``cached_bytes`` a worker.

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
        self._given = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        self._options = storage_options or {}
        self._columns = list(columns) if columns is not None else None
        self._decode = decode or decode_numbers
        self._cached_bytes = cached_bytes
        self._groups = tuple(self._look())

    def block_sizes(self) -> tuple[int, ...]:
        return tuple(group.num_rows for group in self._groups)

    def open(self) -> ParquetReader:
        return ParquetReader(self._groups, self._columns, self._decode, self._options, self._cached_bytes)

    def describe(self) -> dict[str, Any]:
        """Paths, columns and size; never the storage options, which may hold secrets."""
        return {
            "kind": "Parquet",
            "paths": self._given,
            "columns": self._columns,
            "num_files": len({group.path for group in self._groups}),
            "num_row_groups": len(self._groups),
            "num_rows": sum(group.num_rows for group in self._groups),
        }

    def _look(self) -> list[_Group]:
        files = [file for path in self._given for file in _files_of(path, self._options)]
        if not files:
            raise ConfigError(f"Parquet needs at least one file, and {', '.join(self._given)} holds none")
        with ThreadPoolExecutor(min(_FOOTER_READERS, len(files))) as pool:
            footers = list(pool.map(lambda file: _footer(file, self._options), files))
        first = footers[0].schema.to_arrow_schema()
        for file, footer in zip(files, footers, strict=True):
            _check_schema(files[0], first, file, footer.schema.to_arrow_schema())
        _check_columns(self._columns, first.names)
        return [
            _Group(file, index, footer.row_group(index).num_rows)
            for file, footer in zip(files, footers, strict=True)
            for index in range(footer.num_row_groups)
        ]


class ParquetReader:
    """Reads row groups in background threads, each once while it is kept."""

    def __init__(
        self,
        groups: Sequence[_Group],
        columns: list[str] | None,
        decode: Decode,
        options: dict[str, Any],
        cached_bytes: int,
    ) -> None:
        self._groups = groups
        self._columns = columns
        self._decode = decode
        self._options = options
        self._room_bytes = cached_bytes
        self._pool = ThreadPoolExecutor(_GROUP_READERS, thread_name_prefix="shoal-parquet")
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Future[Batch]] = OrderedDict()
        self._files = threading.local()

    def gather(self, parts: Sequence[Part]) -> Batch:
        decoded = [(self._block(part.block), part) for part in parts]
        return joined([rows_of(future.result(), torch.from_numpy(np.asarray(part.rows))) for future, part in decoded])

    def expect(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._block(part.block)

    def _block(self, block: int) -> Future[Batch]:
        with self._lock:
            future = self._kept.get(block)
            if future is None:
                self._make_room()
                future = self._kept[block] = self._pool.submit(self._read, self._groups[block])
            self._kept.move_to_end(block)
            return future

    def _make_room(self) -> None:
        """Forget the longest unused row groups, as far as what is kept is over the limit."""
        sizes = {b: _num_bytes(f.result()) for b, f in self._kept.items() if f.done() and f.exception() is None}
        total = sum(sizes.values())
        for block, num_bytes in sizes.items():
            if total <= self._room_bytes:
                break
            del self._kept[block]
            total -= num_bytes

    def _read(self, group: _Group) -> Batch:
        where = f"row group {group.index} of {group.path}"
        try:
            table = self._file(group.path).read_row_group(group.index, columns=self._columns, use_threads=False)
        except Exception as error:
            raise StoreFault(f"{where} cannot be read: {error}; is the file truncated or gone?") from error
        batch = self._decode(table)
        tensors = batch.values() if isinstance(batch, dict) else batch
        if not isinstance(batch, dict | tuple) or not all(isinstance(t, torch.Tensor) for t in tensors):
            raise ConfigError(f"decode must return a tuple or dict of tensors, not {type(batch).__name__}")
        for tensor in batch.values() if isinstance(batch, dict) else batch:
            if tensor.ndim == 0 or len(tensor) != group.num_rows:
                raise ConfigError(f"decode made {tuple(tensor.shape)} of {where}, which has {group.num_rows} rows")
        return batch

    def _file(self, path: str) -> Any:
        """This thread's open file: a Parquet reader serves one thread at a time."""
        import pyarrow.parquet as pq

        files: dict[str, Any] = self._files.__dict__
        if path not in files:
            files[path] = pq.ParquetFile(_opened(path, self._options), pre_buffer=False)
        return files[path]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._kept.clear()


def decode_numbers(table: Any) -> Batch:
    """Each column as a tensor by its name: numbers as (rows,), fixed-size lists of numbers as (rows, length)."""
    import pyarrow as pa

    out = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        kind = array.type
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else None
        flat = array.flatten() if width else array
        if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)):
            raise ConfigError(f"column {name} is {kind}, which is no number: choose columns, or give decode")
        if flat.null_count:
            raise ConfigError(f"column {name} has {flat.null_count} nulls in a row group: fill them, or give decode")
        values = np.array(flat.to_numpy(zero_copy_only=False))
        out[name] = torch.from_numpy(values.reshape(len(array), width) if width else values)
    return out


def _num_bytes(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in (batch.values() if isinstance(batch, dict) else batch))


def _is_url(path: str) -> bool:
    return "://" in path


def _files_of(path: str, options: dict[str, Any]) -> list[str]:
    """The Parquet files that a path, folder, glob or URL stands for, in order."""
    if _is_url(path):
        return _remote_files(path, options)
    local = Path(path)
    if local.is_dir():
        return sorted(str(file) for file in local.rglob("*.parquet"))
    if any(sign in path for sign in "*?["):
        anchor = Path(local.anchor) if local.is_absolute() else Path()
        return sorted(str(file) for file in anchor.glob(str(local.relative_to(anchor) if local.anchor else local)))
    if not local.is_file():
        raise ConfigError(f"a Parquet file is needed, and {path} does not exist")
    return [path]


def _remote_files(path: str, options: dict[str, Any]) -> list[str]:
    import fsspec

    try:
        system, inner = fsspec.core.url_to_fs(path, **options)
        if any(sign in inner for sign in "*?["):
            found = system.glob(inner)
        elif system.isdir(inner):
            found = system.glob(inner.rstrip("/") + "/**/*.parquet")
        elif system.exists(inner):
            found = [inner]
        else:
            raise ConfigError(f"a Parquet file is needed, and {path} does not exist")
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"{path} cannot be looked into: {error}") from error
    return sorted(system.unstrip_protocol(file) for file in found)


def _opened(path: str, options: dict[str, Any]) -> Any:
    if not _is_url(path):
        return path
    import fsspec

    system, inner = fsspec.core.url_to_fs(path, **options)
    return system.open(inner, "rb", cache_type="readahead")


def _footer(path: str, options: dict[str, Any]) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(_opened(path, options)).metadata
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}; is it truncated?") from error


def _check_schema(first_path: str, first: Any, path: str, schema: Any) -> None:
    for name in dict.fromkeys((*first.names, *schema.names)):
        kinds = [str(s.field(name).type) if name in s.names else "absent" for s in (first, schema)]
        if kinds[0] != kinds[1]:
            raise ConfigError(
                f"column {name} is {kinds[0]} in {first_path} and {kinds[1]} in {path}; give files of one schema"
            )


def _check_columns(columns: list[str] | None, there: list[str]) -> None:
    for name in columns or []:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}"
            raise ConfigError(f"the Parquet files have no column {name}; {hint}")
