"""Where samples come from."""

from shoal.sources.arrays import Arrays
from shoal.sources.batches import count_samples, to_device
from shoal.sources.parquet import Parquet
from shoal.sources.prefetch import LocalBatch, Prefetch
from shoal.sources.source import Batch, Reader, Source

__all__ = ["Arrays", "Batch", "LocalBatch", "Parquet", "Prefetch", "Reader", "Source", "count_samples", "to_device"]
