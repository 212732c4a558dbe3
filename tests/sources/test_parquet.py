from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shoal.errors import ConfigError, StoreFault
from shoal.lanes import Part
from shoal.sources import Parquet
from shoal.sources.files import byte_ranges
from tests.sources.rows import NUM_ROWS, POINTS, decode, table, write

ROW = [Part(0, np.array([0]))]


def test_row_groups_are_the_blocks(tmp_path: Path) -> None:
    assert Parquet(write(tmp_path), ["label"]).block_sizes() == (8, 8, 4, 1, 8, 8, 8, 2)


def test_numbers_become_tensors_by_name_and_fixed_lists_matrices(tmp_path: Path) -> None:
    batch = Parquet(write(tmp_path), ["label", "point"]).open().gather([Part(1, np.array([3, 0]))])
    assert isinstance(batch, dict)
    assert batch["label"].tolist() == [110, 80]
    assert torch.equal(batch["point"], torch.from_numpy(POINTS[[11, 8]]))


def test_booleans_and_small_numbers_keep_their_types(tmp_path: Path) -> None:
    pq.write_table(pa.table({"b": [True, False], "u": pa.array([1, 2], pa.uint8())}), tmp_path / "x.parquet")
    batch = Parquet(tmp_path / "x.parquet").open().gather([Part(0, np.array([1, 0]))])
    assert isinstance(batch, dict)
    assert batch["b"].tolist() == [False, True]
    assert batch["u"].dtype == torch.uint8


def test_a_hidden_file_of_a_folder_is_no_data(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "0.parquet").write_text("half")
    (tmp_path / ".0.parquet").write_text("half")
    assert sum(Parquet(tmp_path, ["label"]).block_sizes()) == NUM_ROWS


@pytest.mark.parametrize("path", ["absent.parquet", "absent/*.parquet", "memory://nowhere/x.parquet", "odd://x"])
def test_a_path_that_stands_for_no_file_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match=path.replace("*", r"\*")):
        Parquet(path if "://" in path else tmp_path / path)


def test_no_path_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one path"):
        Parquet([])


@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path) / "1.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"1\.parquet cannot be read as Parquet.*truncated"):
        Parquet(tmp_path)


def test_files_of_other_columns_are_named_with_the_first_that_differs(tmp_path: Path) -> None:
    write(tmp_path)
    pq.write_table(table().set_column(1, "label", pa.array(["a"] * NUM_ROWS)), tmp_path / "3.parquet")
    with pytest.raises(ConfigError, match=r"column label is int64 in .*0\.parquet and string in .*3\.parquet"):
        Parquet(tmp_path)
    pq.write_table(table().drop_columns(["label"]), tmp_path / "3.parquet")
    with pytest.raises(ConfigError, match=r"column label is int64 in .*0\.parquet and absent in .*3\.parquet"):
        Parquet(tmp_path)


def test_only_columns_that_are_read_must_agree(tmp_path: Path) -> None:
    write(tmp_path)
    pq.write_table(table().drop_columns(["words"]), tmp_path / "3.parquet")
    assert sum(Parquet(tmp_path, ["label"]).block_sizes()) == 2 * NUM_ROWS


def test_an_unknown_column_brings_the_nearest_to_mind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column lable; did you mean label\?"):
        Parquet(write(tmp_path), ["lable"])
    with pytest.raises(ConfigError, match="no column xyz; there are point, label, words"):
        Parquet(tmp_path, ["xyz"])
    with pytest.raises(ConfigError, match="must name at least one"):
        Parquet(tmp_path, [])


def test_text_and_nulls_need_decode(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="column words is string, which is no number"):
        Parquet(write(tmp_path / "text")).open().gather(ROW)
    pq.write_table(pa.table({"x": [1.0, None]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="column x has nulls"):
        Parquet(tmp_path / "x.parquet").open().gather(ROW)


BAD_DECODES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a row too few": (lambda rows: (torch.zeros(len(rows) - 1),), r"decode made \(7,\) of row group 0 of .*has 8 rows"),
    "no rows": (lambda rows: (torch.tensor(1.0),), r"decode made \(\) of row group 0"),
    "a tensor alone": (lambda rows: torch.zeros(len(rows)), "it returned a Tensor"),
    "an array": (lambda rows: {"x": np.zeros(len(rows))}, "it returned a dict of ndarray"),
    "nothing": (lambda rows: (), "it returned a tuple"),
    "an exception": (lambda rows: rows["absent"], r"decode failed on row group 0 of .*0\.parquet: KeyError"),
}


@pytest.mark.parametrize("name", BAD_DECODES)
def test_a_decode_that_makes_no_batch_is_told_why(tmp_path: Path, name: str) -> None:
    bad, message = BAD_DECODES[name]
    with pytest.raises(ConfigError, match=message):
        Parquet(write(tmp_path), decode=bad).open().gather(ROW)


def test_a_decode_that_changes_its_mind_is_told_where(tmp_path: Path) -> None:
    source = Parquet(write(tmp_path), decode=lambda rows: {"x": torch.zeros(len(rows), len(rows))})
    with pytest.raises(ConfigError, match="decode made") as told:  # of the two, either may be read first
        source.open().gather([*ROW, Part(2, np.array([0]))])
    assert "float32 (rows, 4)) of row group 2 of" in str(told.value)
    assert "float32 (rows, 8)) of row group 0 of" in str(told.value)


def test_a_file_that_goes_is_a_fault_and_is_tried_again(tmp_path: Path) -> None:
    file = write(tmp_path, cuts=(0, NUM_ROWS)) / "0.parquet"
    reader = Parquet(file, ["label"]).open()
    file.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreFault, match=r"row group 0 of .*0\.parquet cannot be read"):
        reader.gather(ROW)
    (tmp_path / "elsewhere").rename(file)
    assert reader.gather(ROW)["label"].tolist() == [0]  # type: ignore[call-overload]


def test_a_file_that_is_cut_after_its_footer_was_read_is_a_fault(tmp_path: Path) -> None:
    file = write(tmp_path, cuts=(0, NUM_ROWS)) / "0.parquet"
    reader = Parquet(file, ["label"]).open()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StoreFault, match="truncated, changed or gone"):
        reader.gather([Part(5, np.array([0]))])


def counting(reads: list[int]) -> Callable[[Any], Any]:
    """A decode that notes the first label of each row group it is given."""

    def count(rows: Any) -> Any:
        reads.append(rows["label"][0].as_py())
        return decode(rows)

    return count


def test_a_row_group_is_read_once_while_there_is_room(tmp_path: Path) -> None:
    reads: list[int] = []
    reader = Parquet(write(tmp_path), decode=counting(reads)).open()
    for _ in range(3):
        reader.gather([*ROW, Part(3, np.array([0])), *ROW])
    assert sorted(reads) == [0, 200]


def test_what_was_used_last_is_kept(tmp_path: Path) -> None:
    reads: list[int] = []
    two_groups = 2 * 8 * (3 * 4 + 8)
    reader = Parquet(write(tmp_path), decode=counting(reads), cached_bytes=two_groups).open()
    for block in (0, 1, 0, 4, 0, 1):
        reader.gather([Part(block, np.array([0]))])
    assert reads == [0, 80, 210, 80]


def test_what_is_held_is_kept_until_it_is_released(tmp_path: Path) -> None:
    reads: list[int] = []
    reader = Parquet(write(tmp_path), decode=counting(reads), cached_bytes=0).open()
    reader.expect([0, 1])
    for block in (0, 4, 1, 0):
        reader.gather([Part(block, np.array([0]))])
    reader.release([0, 1])
    reader.gather(ROW)
    assert sorted(reads) == [0, 0, 80, 210]


def test_a_negative_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cached_bytes must be at least 0"):
        Parquet(write(tmp_path), cached_bytes=-1)


def test_only_the_columns_bytes_are_asked_for(tmp_path: Path) -> None:
    wide = pa.table({name: np.random.default_rng(0).random(100_000) for name in "abc"})
    pq.write_table(wide, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    group = pq.read_metadata(tmp_path / "x.parquet").row_group(0)
    (all_start, all_stop), (first, last) = byte_ranges(group, None)[0], byte_ranges(group, ["b"])[0]
    assert all_start < first < last < all_stop
    assert last - first == group.column(1).total_compressed_size
    assert len(byte_ranges(group, ["a", "c"])) == 2
