"""Ray Data reading the files of ``benchmarks.ingest``: rows a second, an epoch after another.

    python -m benchmarks.peers.with_ray_data BATCH SHUFFLED_ROWS EPOCHS FILE...

It starts a Ray cluster of its own on this machine and ends it; its last line is a JSON list, a number an epoch. Files
are read in random order, and a batch is drawn from a buffer of SHUFFLED_ROWS rows; 0 for no buffer. The first epoch
starts Ray's workers too.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import ray
import ray.data

SIDE = 28


def decode(rows: pa.Table) -> dict[str, np.ndarray]:
    """A block's images (n, 28, 28) uint8 and labels (n,), with one copy."""
    images = rows["image"].combine_chunks()
    pixels = np.frombuffer(images.buffers()[1], np.uint8, len(images) * SIDE * SIDE, images.offset * SIDE * SIDE)
    return {"image": pixels.reshape(-1, SIDE, SIDE), "label": rows["label"].to_numpy()}


def rows_per_s(paths: list[str], batch: int, shuffled_rows: int) -> float:
    """One epoch, from planning to the last row."""
    begun_s = time.perf_counter()
    rows = ray.data.read_parquet(paths, shuffle="files").map_batches(decode, batch_format="pyarrow", batch_size=None)
    batches = rows.iter_torch_batches(
        batch_size=batch, prefetch_batches=4, local_shuffle_buffer_size=shuffled_rows or None
    )
    num_rows = sum(len(found["label"]) for found in batches)
    return num_rows / (time.perf_counter() - begun_s)


def main(batch: int, shuffled_rows: int, epochs: int, paths: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            speeds = [rows_per_s(paths, batch, shuffled_rows) for _ in range(epochs)]
        finally:
            ray.shutdown()
    print(json.dumps(speeds), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
