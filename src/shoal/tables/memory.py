"""Memory that is reserved whole and taken page by page, as it is first written: an array that grows without a copy."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros that take no memory until they are written. ``ConfigError`` if the kernel does not promise so much."""
    kind = np.dtype(dtype)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    try:
        room = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"a table was to reserve {num_bytes} bytes of memory, and the kernel says: {error}; give it a smaller "
            "budget"
        ) from None
    return np.frombuffer(room, kind, num_bytes // kind.itemsize).reshape(shape)
