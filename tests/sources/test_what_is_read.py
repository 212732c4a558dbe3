"""A worker reads its own share, once, and no more of a file than it needs."""

from __future__ import annotations

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

from shoal.lanes import Order, Part, Steps, deal
from shoal.sources import Batch, Parquet, Prefetch

ROWS_A_GROUP = 50
NUM_LANES = 64


def write(folder: Path, num_groups: int) -> Path:
    pq.write_table(pa.table({"x": np.arange(num_groups * ROWS_A_GROUP)}), folder / "x.parquet", ROWS_A_GROUP)
    return folder


def reads_of(folder: Path, lanes: tuple[int, ...], epochs: int) -> Counter[int]:
    """How often a worker with these lanes decodes each row group, with nothing kept after its use."""
    reads: Counter[int] = Counter()

    def decode(rows: Any) -> Batch:
        reads[rows["x"][0].as_py() // ROWS_A_GROUP] += 1
        return (torch.from_numpy(rows["x"].to_numpy().copy()),)

    source = Parquet(folder, decode=decode, cached_bytes=0)
    sizes, reader = source.block_sizes(), source.open()
    steps = Steps(sum(sizes), 128, NUM_LANES, epochs=epochs)
    order = lru_cache(2)(lambda epoch: Order(sizes, NUM_LANES, 0, epoch))
    loader = Prefetch(reader, order, steps, lanes, first_step=0)
    assert sum(local.num_samples for local in loader) == epochs * sum(order(0).lane_size(lane) for lane in lanes)
    loader.close()
    reader.close()
    return reads


@pytest.mark.parametrize("num_groups", [1, 10, 60, 64, 65, 200])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_worker_decodes_the_row_groups_of_its_lanes_and_each_once(
    tmp_path: Path, num_groups: int, num_workers: int
) -> None:
    write(tmp_path, num_groups)
    for lanes in deal(NUM_LANES, {str(worker): 1.0 for worker in range(num_workers)}).values():
        reads = reads_of(tmp_path, lanes, epochs=1)
        assert set(reads.values()) == {1}
        assert len(reads) <= num_groups * len(lanes) / NUM_LANES + 2


def test_an_epoch_after_another_decodes_each_row_group_once_an_epoch(tmp_path: Path) -> None:
    reads = reads_of(write(tmp_path, 200), tuple(range(NUM_LANES)), epochs=3)
    assert len(reads) == 200
    assert set(reads.values()) <= {2, 3}, "one that two epochs need at once is read once for both"


def test_lanes_that_are_no_neighbours_cost_a_row_group_each_end(tmp_path: Path) -> None:
    """As after many deals: a row group on the border of two workers' lanes is read by both."""
    lanes = tuple(range(0, NUM_LANES, 4))
    reads = reads_of(write(tmp_path, 200), lanes, epochs=1)
    assert set(reads.values()) == {1}
    assert len(reads) <= 200 / 4 + 2 * len(lanes)


@pytest.mark.parametrize(("columns", "fraction"), [(None, 1.0), (["b"], 0.25), (["a", "c"], 0.5)])
def test_from_afar_only_the_bytes_of_the_columns_of_one_row_group_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: list[str] | None, fraction: float
) -> None:
    table = pa.table({name: np.random.default_rng(0).random(200_000) for name in "abcd"})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=50_000, compression="none", use_dictionary=False)
    system = fsspec.filesystem("memory")
    system.pipe_file("/afar.parquet", (tmp_path / "x.parquet").read_bytes())
    source, plain, num_bytes = Parquet("memory://afar.parquet", columns), type(system).cat_file, []

    def counted(*args: Any, **options: Any) -> bytes:
        data: bytes = plain(*args, **options)
        num_bytes.append(len(data))
        return data

    monkeypatch.setattr(type(system), "cat_file", counted)
    reader = source.open()
    reader.gather([Part(2, np.array([7]))])
    reader.close()
    assert sum(num_bytes) == pytest.approx(fraction * 4 * 50_000 * 8, rel=0.01)
    assert len(num_bytes) == (2 if columns == ["a", "c"] else 1)


def test_importing_sources_leaves_arrow_alone() -> None:
    script = "import sys, shoal.sources; shoal.sources.Arrays([1]); print([m for m in sys.modules if 'arrow' in m])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
