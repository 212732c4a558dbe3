"""What Shoal is compared with reads the same rows: each once an epoch, in another order each time."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.ingest import ours
from benchmarks.loaders import BatchedMapStyle, ByRowGroup, MapStyle, decode, loader_of, write_files

NUM_ROWS = 1300


def rows_of(batches: object) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)  # type: ignore[call-overload]
    return torch.cat(images), torch.cat(labels)


def fingerprints(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, int]]:
    weights = torch.arange(1, images[0].numel() + 1)
    return list(zip((images.flatten(1).long() * weights).sum(1).tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("kept", [1, 100])
@pytest.mark.parametrize("kind", [MapStyle, BatchedMapStyle, ByRowGroup])
def test_every_loader_reads_each_row_once_an_epoch_shuffled_anew(tmp_path: Path, kind: type, kept: int) -> None:
    paths = write_files(tmp_path, NUM_ROWS)
    table = rows_of(decode(pq.read_table(path)) for path in paths)
    loader = loader_of(kind(paths) if kind is ByRowGroup else kind(paths, kept), workers=0)
    first, second = (fingerprints(*rows_of(loader)) for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(fingerprints(*table))
    assert first != second


def test_ours_reads_every_row(tmp_path: Path) -> None:
    assert ours(write_files(tmp_path, NUM_ROWS), 2) > 0  # it checks the count itself
