from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shoal.errors import ConfigError, StoreFault
from shoal.lanes import Order, Part, Steps, deal
from shoal.sources import Batch, Parquet, Prefetch
from tests.sources.rows import NUM_ROWS, table, write


def part(block: int, *rows: int) -> Part:
    return Part(block, np.array(rows, np.int64))


def gather(source: Parquet, *parts: Part) -> Batch:
    reader = source.open()
    try:
        return reader.gather(parts or [part(0, 0)])
    finally:
        reader.close()


def file_of(folder: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), folder / "file.parquet")
    return folder / "file.parquet"


# What it reads


def test_numbers_of_every_kind_become_tensors_of_theirs(tmp_path: Path) -> None:
    kinds = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
    columns = {kind: pa.array(np.arange(2, dtype=kind)) for kind in kinds}
    batch = gather(Parquet(file_of(tmp_path, truth=pa.array([True, False]), **columns)), part(0, 1, 0))
    assert isinstance(batch, dict)
    assert {name: str(tensor.dtype) for name, tensor in batch.items()} == {
        "truth": "torch.bool", **{kind: f"torch.{kind}" for kind in kinds},
    }  # fmt: skip
    assert batch["truth"].tolist() == [False, True]
    assert all(batch[kind].tolist() == [1, 0] for kind in kinds)


def test_only_the_columns_that_are_named_are_read(tmp_path: Path) -> None:
    batch = gather(Parquet(write(tmp_path), columns=["label"]))
    assert isinstance(batch, dict)
    assert list(batch) == ["label"]


def test_a_folder_is_searched_but_for_what_is_hidden(tmp_path: Path) -> None:
    write(tmp_path / "day=1", cuts=(0, 5))
    for hidden in ("_temporary", ".trash"):
        write(tmp_path / "day=1" / hidden, cuts=(5, 9))
    (tmp_path / "_SUCCESS").touch()
    assert Parquet(tmp_path).block_sizes() == (5,)


def test_a_url_of_a_folder_is_searched_but_for_what_is_hidden(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    data = (write(tmp_path, cuts=(0, 5)) / "0.parquet").read_bytes()
    for path in ("/searched/day=1/0.parquet", "/searched/1.parquet", "/searched/_temporary/0.parquet"):
        system.pipe_file(path, data)
    assert Parquet("memory://searched", columns=["label"]).block_sizes() == (5, 5)


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "[a].parquet")
    assert sum(Parquet(tmp_path / "[a].parquet").block_sizes()) == NUM_ROWS


def test_files_may_differ_in_columns_that_are_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path, cuts=(0, 5, 10))
    pq.write_table(table(5, 10).drop_columns(["words"]), folder / "1.parquet")
    assert Parquet(folder, columns=["label"]).block_sizes() == (5, 5)


@pytest.mark.parametrize(("columns", "most"), [(None, 1.2), (["label"], 0.5)])
def test_from_afar_only_the_bytes_of_the_columns_of_its_row_groups_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: list[str] | None, most: float
) -> None:
    random = np.random.default_rng(0).integers(0, 2**62, size=(400_000, 2))
    path = tmp_path / "wide.parquet"
    names = {"label": random[:, 0], "a": random[:, 1], "b": random[:, 1], "c": random[:, 1]}
    pq.write_table(pa.table(names), path, row_group_size=100_000, use_dictionary=False, compression="none")
    system = fsspec.filesystem("memory")
    system.pipe_file("/wide.parquet", path.read_bytes())
    source, fetched = Parquet("memory://wide.parquet", columns=columns, decode=None), Counter[str]()
    plain = system.cat_file

    def counted(name: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data: bytes = plain(name, start=start, end=end, **options)
        fetched.update(bytes=len(data), requests=1)
        return data

    monkeypatch.setattr(type(system), "cat_file", lambda self, *args, **options: counted(*args, **options))
    gather(source, part(2, 5))
    assert 0.2 < fetched["bytes"] / (path.stat().st_size / 4) < most
    assert fetched["requests"] == 1


# How often it reads


def reads_in_an_epoch(source: Parquet, num_workers: int, num_lanes: int, global_batch: int) -> list[Counter[int]]:
    """How often each worker decoded each row group in one epoch, in the background and as it was needed."""
    sizes = source.block_sizes()
    steps = Steps(sum(sizes), global_batch, num_lanes, epochs=1)
    order = lru_cache(2)(lambda epoch: Order(sizes, num_lanes, seed=0, epoch=epoch))
    found = []
    for lanes in deal(num_lanes, {str(worker): 1.0 for worker in range(num_workers)}).values():
        reader, counts = source.open(), Counter[int]()
        plain = reader._cache._read
        reader._cache._read = lambda block, plain=plain, counts=counts: (counts.update([block]), plain(block))[1]  # type: ignore[misc]
        loader = Prefetch(reader, order, steps, lanes, first_step=0)
        assert sum(local.num_samples for local in loader) == sum(order(0).lane_size(lane) for lane in lanes)
        loader.close()
        reader.close()
        found.append(counts)
    return found


@pytest.mark.parametrize("num_groups", [10, 60, 64, 200])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_worker_decodes_each_row_group_that_its_lanes_touch_once(
    tmp_path: Path, num_groups: int, num_workers: int
) -> None:
    pq.write_table(pa.table({"x": np.arange(num_groups * 50)}), tmp_path / "x.parquet", row_group_size=50)
    workers = reads_in_an_epoch(Parquet(tmp_path, cached_bytes=0), num_workers, num_lanes=64, global_batch=128)
    assert all(set(counts.values()) == {1} for counts in workers)
    assert all(len(counts) <= num_groups / num_workers + 3 for counts in workers)


def test_what_is_in_no_lane_any_more_is_let_go(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": np.arange(4000)}), tmp_path / "x.parquet", row_group_size=10)
    source = Parquet(tmp_path, cached_bytes=0)
    sizes, steps = source.block_sizes(), Steps(4000, 8, 8, epochs=1)
    reader, most = source.open(), 0
    loader = Prefetch(reader, lru_cache(2)(lambda e: Order(sizes, 8, 0, e)), steps, tuple(range(8)), first_step=0)
    for _ in loader:
        most = max(most, len(reader._cache._blocks))
    loader.close()
    assert 8 <= most <= 3 * 8
    assert not reader._cache._blocks
    reader.close()


# Bad input


@pytest.mark.parametrize("absent", ["absent.parquet", "*.csv", "empty", "memory://absent", "memory://*.csv"])
def test_a_path_that_stands_for_no_file_is_named(tmp_path: Path, absent: str) -> None:
    there = write(tmp_path) / "0.parquet"
    (tmp_path / "empty").mkdir()
    path = absent if "://" in absent else str(tmp_path / absent)
    with pytest.raises(ConfigError, match=f"{re.escape(path)} stands for none"):
        Parquet([there, path])


def test_no_path_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one path"):
        Parquet([])


def test_a_url_that_nothing_serves_is_refused() -> None:
    with pytest.raises(ConfigError, match="nosuch://x cannot be looked into"):
        Parquet("nosuch://x")


@pytest.mark.parametrize("length", [0, 3, 100, -1, -200])
def test_a_truncated_file_is_named(tmp_path: Path, length: int) -> None:
    path = write(tmp_path) / "1.parquet"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"1\.parquet cannot be read as Parquet.*truncated"):
        Parquet(tmp_path)


def test_a_file_that_is_cut_later_is_a_fault_that_names_the_row_group(tmp_path: Path) -> None:
    source = Parquet(write(tmp_path), columns=["label"])
    path = tmp_path / "0.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreFault, match=r"row group 1 of .*0\.parquet cannot be read"):
        gather(source, part(1, 0))


def test_a_url_that_is_cut_later_is_a_fault_too(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    data = (write(tmp_path) / "0.parquet").read_bytes()
    system.pipe_file("/cut.parquet", data)
    source = Parquet("memory://cut.parquet", columns=["label"])
    system.pipe_file("/cut.parquet", data[:100])
    with pytest.raises(StoreFault, match=r"row group 1 of memory://.*cut\.parquet cannot be read"):
        gather(source, part(1, 0))
    system.rm_file("/cut.parquet")
    with pytest.raises(StoreFault, match="truncated, changed or gone"):
        gather(source, part(1, 0))


def test_what_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    source = Parquet(write(tmp_path), columns=["label"])
    reader = source.open()
    (tmp_path / "0.parquet").rename(tmp_path / "away")
    with pytest.raises(StoreFault, match="gone"):
        reader.gather([part(0, 0)])
    (tmp_path / "away").rename(tmp_path / "0.parquet")
    assert len(reader.gather([part(0, 0)])) == 1
    reader.close()


def test_the_first_column_that_differs_is_named_with_both_files(tmp_path: Path) -> None:
    write(tmp_path, cuts=(0, 5, 10))
    other = table(5, 10).set_column(1, "label", pa.array(["a"] * 5))
    pq.write_table(other, tmp_path / "1.parquet")
    with pytest.raises(ConfigError, match=r"column label is int64 in .*0\.parquet and string in .*1\.parquet"):
        Parquet(tmp_path)
    pq.write_table(table(5, 10).drop_columns(["point"]), tmp_path / "1.parquet")
    with pytest.raises(ConfigError, match=r"column point is .* in .*0\.parquet and absent in .*1\.parquet"):
        Parquet(tmp_path)


def test_an_unknown_column_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column labels; did you mean label\?"):
        Parquet(write(tmp_path), columns=["labels"])
    with pytest.raises(ConfigError, match="no column zzz; there are point, label, words"):
        Parquet(tmp_path, columns=["zzz"])
    with pytest.raises(ConfigError, match="must name at least one; there are point, label, words"):
        Parquet(tmp_path, columns=[])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", "b"]), "column x is string, which is no number"),
        (pa.array([1, None]), "column x has nulls"),
        (pa.array([[1], None], pa.list_(pa.int64(), 1)), "column x has nulls"),
        (pa.array([[None], [1]], pa.list_(pa.int64(), 1)), "column x has nulls"),
        (pa.array([["a"], ["b"]], pa.list_(pa.string(), 1)), "column x is .*string.*, which is no number"),
        (pa.array([[1], [1, 2]]), "column x is list.*, which is no number"),
    ],
)
def test_a_column_that_is_no_tensor_says_what_to_do(tmp_path: Path, column: pa.Array, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"row group 0 of .*file\.parquet: {message}.*or give decode"):
        gather(Parquet(file_of(tmp_path, x=column)))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda rows: (torch.zeros(len(rows) - 1),), r"decode made \(7,\) of row group 0 of .*, which has 8 rows"),
        (lambda rows: (torch.tensor(1.0),), r"decode made \(\) of row group 0"),
        (lambda rows: torch.zeros(len(rows)), "must return a tuple or dict of tensors, and it returned a Tensor"),
        (lambda rows: {"x": np.zeros(len(rows))}, "returned a dict of ndarray"),
        (lambda rows: (), "returned a tuple"),
        (lambda rows: None, "returned a NoneType"),
        (lambda rows: rows["absent"], r"decode failed on row group 0 of .*: KeyError"),
    ],
)
def test_a_decode_that_makes_no_batch_is_refused(tmp_path: Path, returned: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gather(Parquet(write(tmp_path), decode=returned))


def test_a_decode_that_makes_other_shapes_of_other_row_groups_is_refused(tmp_path: Path) -> None:
    source = Parquet(write(tmp_path), decode=lambda rows: (torch.zeros(len(rows), len(rows)),))
    with pytest.raises(ConfigError, match=r"decode made \(0: float32 \(rows, [48]\)\) of row group . of .* and \(0: "):
        gather(source, part(0, 0), part(2, 0))


def test_room_is_never_negative(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cached_bytes must be at least 0"):
        Parquet(write(tmp_path), cached_bytes=-1)


def test_importing_sources_leaves_arrow_where_it_is() -> None:
    script = "import sys, shoal.sources; shoal.sources.Arrays([1]); print([m for m in sys.modules if 'arrow' in m])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
