"""Make train.parquet and test.parquet from the four files of Fashion-MNIST.

    apt install dataset-fashion-mnist
    python examples/data/make.py [FOLDER OF THE FOUR FILES]

The same input gives the same bytes with the same version of pyarrow.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).parent
PIXELS = 28 * 28
ROWS_A_GROUP = 1_000


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file of bytes."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    num_axes = data[3]
    shape = np.frombuffer(data, ">u4", count=num_axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def to_table(images: np.ndarray, labels: np.ndarray) -> pa.Table:
    """Images (n, 28, 28) and labels (n,) as two columns."""
    pixels = pa.py_buffer(np.ascontiguousarray(images))
    image = pa.FixedSizeBinaryArray.from_buffers(pa.binary(PIXELS), len(images), [None, pixels])
    return pa.table({"image": image, "label": pa.array(labels, pa.uint8())})


def write(table: pa.Table, path: Path) -> None:
    """No two images are alike, so neither a dictionary nor their least and greatest would be of use."""
    pq.write_table(
        table,
        path,
        row_group_size=ROWS_A_GROUP,
        compression="zstd",
        compression_level=19,
        use_dictionary=["label"],
        write_statistics=["label"],
    )


def main(source: Path) -> None:
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        path = FOLDER / f"{split}.parquet"
        write(to_table(images, labels), path)
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("/usr/share/datasets/fashion-mnist"))
