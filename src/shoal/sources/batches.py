"""What can be said of a batch whatever its kind."""

from __future__ import annotations

from shoal.sources.source import Batch


def count_samples(batch: Batch) -> int:
    """The length of a batch's first axis."""
    first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return len(first)


def to_device(batch: Batch, device: str) -> Batch:
    """The batch's tensors on ``device``."""
    if device == "cpu":
        return batch
    if isinstance(batch, dict):
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return tuple(tensor.to(device) for tensor in batch)
