"""The Parquet files that loaders are compared on, and what a competent user of ``DataLoader`` writes to read them."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

SIDE = 28
NUM_CLASSES = 10
ROWS_A_GROUP = 500
ROWS_A_FILE = 15_000
BATCH = 256

Rows = tuple[Tensor, Tensor]


def write_files(folder: Path, num_rows: int, seed: int = 0) -> list[Path]:
    """Files of (image: 784 bytes, label: int64), Snappy as by default. Each class is a faint pattern under noise."""
    random = np.random.default_rng(seed)
    patterns = random.integers(96, size=(NUM_CLASSES, SIDE * SIDE), dtype=np.uint8)
    paths = []
    for start in range(0, num_rows, ROWS_A_FILE):
        labels = random.integers(NUM_CLASSES, size=min(ROWS_A_FILE, num_rows - start))
        images = patterns[labels] + random.integers(160, size=(len(labels), SIDE * SIDE), dtype=np.uint8)
        kind = pa.binary(SIDE * SIDE)
        column = pa.FixedSizeBinaryArray.from_buffers(kind, len(labels), [None, pa.py_buffer(images)])
        paths.append(folder / f"{start // ROWS_A_FILE:03}.parquet")
        pq.write_table(pa.table({"image": column, "label": labels}), paths[-1], row_group_size=ROWS_A_GROUP)
    return paths


def decode(table: pa.Table) -> Rows:
    """A row group as tensors: (n, 28, 28) uint8 and (n,) int64. Every loader uses this; it copies nothing twice."""
    images = table["image"].combine_chunks()
    pixels = np.frombuffer(images.buffers()[1], np.uint8, len(images) * SIDE * SIDE, images.offset * SIDE * SIDE)
    return torch.from_numpy(pixels.reshape(-1, SIDE, SIDE).copy()), torch.from_numpy(table["label"].to_numpy().copy())


class RowGroups:
    """Row groups by number over all files, decoded, and those used last kept. Files are opened where they are read."""

    def __init__(self, paths: Sequence[Path], most_kept: int) -> None:
        self._paths = list(paths)
        self._most_kept = most_kept
        footers = [pq.read_metadata(path) for path in paths]
        self._places = [(f, g) for f, footer in enumerate(footers) for g in range(footer.num_row_groups)]
        self.ends = list(accumulate(footers[f].row_group(g).num_rows for f, g in self._places))
        self._files: dict[int, pq.ParquetFile] = {}
        self._kept: OrderedDict[int, Rows] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Rows:
        rows = self._kept.get(number)
        if rows is None:
            rows = self._kept[number] = self._read(number)
            if len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return rows

    def _read(self, number: int) -> Rows:
        file, group = self._places[number]
        if file not in self._files:
            self._files[file] = pq.ParquetFile(self._paths[file])
        return decode(self._files[file].read_row_group(group))


class MapStyle(Dataset):
    """Rows by index, one at a time, as ``Dataset`` asks."""

    def __init__(self, paths: Sequence[Path], most_kept: int) -> None:
        self._groups = RowGroups(paths, most_kept)

    def __len__(self) -> int:
        return self._groups.ends[-1]

    def __getitem__(self, index: int) -> Rows:
        group = bisect_right(self._groups.ends, index)
        images, labels = self._groups[group]
        row = index - self._groups.ends[group]  # from the end, which indexing allows
        return images[row], labels[row]


class BatchedMapStyle(MapStyle):
    """The same by whole batches: torch calls ``__getitems__`` if it is there, and documents that only in its source."""

    def __getitems__(self, indices: list[int]) -> Rows:
        ends = self._groups.ends
        images = torch.empty(len(indices), SIDE, SIDE, dtype=torch.uint8)
        labels = torch.empty(len(indices), dtype=torch.int64)
        to_images, to_labels = images.numpy(), labels.numpy()
        for place, index in enumerate(indices):
            group = bisect_right(ends, index)
            from_images, from_labels = self._arrays(group)
            to_images[place] = from_images[index - ends[group]]
            to_labels[place] = from_labels[index - ends[group]]
        return images, labels

    def _arrays(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """NumPy's indexing costs a third of torch's."""
        images, labels = self._groups[group]
        return images.numpy(), labels.numpy()


class ByRowGroup(IterableDataset):
    """Row groups in a random order, dealt to the loader's workers, and the rows of each shuffled: whole batches, each
    out of one or two groups. A weaker shuffle than the others'."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._groups = RowGroups(paths, most_kept=1)
        self.epoch = 0

    def __iter__(self) -> Iterator[Rows]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        order = np.random.default_rng((0, self.epoch)).permutation(len(self._groups))
        self.epoch += 1
        rest: Rows | None = None
        for number in order[index::workers]:
            images, labels = self._groups[int(number)]
            shuffled = torch.randperm(len(labels))
            images, labels = images[shuffled], labels[shuffled]
            if rest is not None:
                images, labels = torch.cat((rest[0], images)), torch.cat((rest[1], labels))
            whole = len(labels) // BATCH * BATCH
            yield from zip(images[:whole].split(BATCH), labels[:whole].split(BATCH), strict=True)
            rest = images[whole:], labels[whole:]
        if rest is not None and len(rest[1]):
            yield rest


def loader_of(dataset: Dataset, workers: int) -> DataLoader:
    """A ``DataLoader`` at its best: workers stay from epoch to epoch, and what is a batch is not made one again."""
    keep = {"persistent_workers": True, "prefetch_factor": 4} if workers else {}
    if isinstance(dataset, ByRowGroup):
        return DataLoader(dataset, batch_size=None, num_workers=workers, **keep)
    if isinstance(dataset, BatchedMapStyle):
        return DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers, collate_fn=as_it_is, **keep)
    return DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers, **keep)


def as_it_is(rows: Rows) -> Rows:
    return rows
