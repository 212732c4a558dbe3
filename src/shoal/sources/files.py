"""Parquet files, wherever they are: found, their footers read, their row groups fetched."""

from __future__ import annotations

import difflib
import glob
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError, StoreFault

_FOOTER_READERS = 8
_WORTH_READING_BYTES = 1 << 18
"""A gap between columns that is read rather than asked around, where each request takes a round trip."""


@dataclass(frozen=True, eq=False)
class File:
    """A file, by a path or URL, and its footer (``pyarrow.parquet.FileMetaData``), which is read once."""

    path: str
    footer: Any
    options: dict[str, Any]

    def read(self, row_group: int, columns: list[str] | None) -> Any:
        """A row group as a ``pyarrow.Table``. ``StoreFault`` if it cannot be read."""
        import pyarrow.parquet as pq

        try:
            source: Any = self._window(row_group, columns) if _is_url(self.path) else self.path
            with pq.ParquetFile(source, metadata=self.footer, pre_buffer=False) as file:
                return file.read_row_group(row_group, columns=columns, use_threads=False)
        except Exception as error:
            raise StoreFault(
                f"row group {row_group} of {self.path} cannot be read: {error}; is the file truncated, changed or gone?"
            ) from error

    def _window(self, row_group: int, columns: list[str] | None) -> _Window:
        system, inner = _system(self.path, self.options)
        ranges = byte_ranges(self.footer.row_group(row_group), columns)
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        pieces = system.cat_ranges([inner] * len(ranges), starts, stops, on_error="raise")
        return _Window(dict(zip(starts, pieces, strict=True)))


def find_files(given: Sequence[str], options: dict[str, Any], columns: Sequence[str] | None) -> list[File]:
    """The files that these paths, folders, globs and URLs stand for, in order, all of one schema.

    In a folder, what begins with a dot or an underscore is not data. ``ConfigError`` for a path that stands for no
    file, a file that is no Parquet, a column that is not there, and columns of different types.
    """
    paths = [path for entry in given for path in _expand(entry, options)]
    if not paths:
        raise ConfigError("Parquet needs at least one path, and there is none")
    with ThreadPoolExecutor(min(_FOOTER_READERS, len(paths))) as pool:
        files = list(pool.map(lambda path: File(path, _footer(path, options), options), paths))
    first = files[0].footer.schema.to_arrow_schema()
    _check_columns(columns, first.names)
    for file in files[1:]:
        _check_schema(files[0].path, first, file, columns)
    return files


def byte_ranges(row_group: Any, columns: Sequence[str] | None) -> list[tuple[int, int]]:
    """Where in its file the columns of a row group are, as few ranges as make sense to ask for."""
    ranges: list[tuple[int, int]] = []
    for start, stop in sorted(_chunks(row_group, columns)):
        if ranges and start - ranges[-1][1] <= _WORTH_READING_BYTES:
            ranges[-1] = ranges[-1][0], max(stop, ranges[-1][1])
        else:
            ranges.append((start, stop))
    return ranges


def _chunks(row_group: Any, columns: Sequence[str] | None) -> list[tuple[int, int]]:
    chunks = []
    for index in range(row_group.num_columns):
        chunk = row_group.column(index)
        path = chunk.path_in_schema
        if columns is None or any(path == name or path.startswith(f"{name}.") for name in columns):
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            chunks.append((start, start + chunk.total_compressed_size))
    return chunks


class _Window(io.RawIOBase):
    """Reads like a file of which only some stretches are here."""

    def __init__(self, pieces: dict[int, bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        ends = (start + len(piece) for start, piece in self._pieces.items())
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: max(ends, default=0)}
        self._position = base[whence] + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        for start, piece in self._pieces.items():
            begin = self._position - start
            if 0 <= begin < len(piece):
                found = piece[begin:] if size is None or size < 0 else piece[begin : begin + size]
                self._position += len(found)
                return found
        return b""


def _is_url(path: str) -> bool:
    return "://" in path


def _system(path: str, options: dict[str, Any]) -> tuple[Any, str]:
    import fsspec

    system, inner = fsspec.core.url_to_fs(path, **options)
    return system, inner


def _expand(path: str, options: dict[str, Any]) -> list[str]:
    found = _expand_url(path, options) if _is_url(path) else _expand_local(path)
    if not found:
        raise ConfigError(f"Parquet files are needed, and {path} stands for none; is the path right?")
    return sorted(found)


def _expand_local(path: str) -> list[str]:
    if Path(path).is_dir():
        return [str(file) for file in Path(path).rglob("*.parquet") if _is_data(str(file.relative_to(path)))]
    if Path(path).is_file():
        return [path]
    return [file for file in glob.glob(path, recursive=True) if Path(file).is_file()]


def _expand_url(path: str, options: dict[str, Any]) -> list[str]:
    try:
        system, inner = _system(path, options)
        if any(sign in inner for sign in "*?["):
            found = system.glob(inner)
        elif system.isdir(inner):
            files = system.find(inner)
            below = len(inner.rstrip("/")) + 1
            found = [file for file in files if file.endswith(".parquet") and _is_data(file[below:])]
        else:
            found = [inner] if system.exists(inner) else []
        return [system.unstrip_protocol(file) for file in found]
    except Exception as error:
        raise ConfigError(f"{path} cannot be looked into: {type(error).__name__}: {error}") from error


def _is_data(relative: str) -> bool:
    return not any(part.startswith((".", "_")) for part in relative.split("/"))


def _footer(path: str, options: dict[str, Any]) -> Any:
    import pyarrow.parquet as pq

    try:
        if not _is_url(path):
            return pq.read_metadata(path)
        system, inner = _system(path, options)
        with system.open(inner, "rb", cache_type="none") as file:
            return pq.read_metadata(file)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}; is it truncated?") from error


def _check_columns(columns: Sequence[str] | None, there: list[str]) -> None:
    if columns is not None and not columns:
        raise ConfigError(f"columns must name at least one; there are {', '.join(there)}")
    for name in columns or ():
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}"
            raise ConfigError(f"the Parquet files have no column {name}; {hint}")


def _check_schema(first_path: str, first: Any, file: File, columns: Sequence[str] | None) -> None:
    schema = file.footer.schema.to_arrow_schema()
    for name in columns or dict.fromkeys((*first.names, *schema.names)):
        kinds = [str(s.field(name).type) if name in s.names else "absent" for s in (first, schema)]
        if kinds[0] != kinds[1]:
            raise ConfigError(
                f"column {name} is {kinds[0]} in {first_path} and {kinds[1]} in {file.path}; give files of one schema"
            )
