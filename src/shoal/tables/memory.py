"""Memory that is reserved whole and taken page by page, as it is first written: an array that grows without a copy."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import ConfigError

_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # on x86 and ARM; Python does not name it
"""What was never written does not count against a fork of this process."""
_LARGE_BYTES = 1 << 23
"""From here on large pages are asked for: rows are read at random, and each small page is one more thing to look up."""


def zeros(shape: tuple[int, ...], dtype: npt.DTypeLike, *, in_order: bool = False) -> npt.NDArray[Any]:
    """Zeros that take no memory until they are written. ``in_order``: they will be, from the first on, so that large
    pages may be taken: at random that would take nearly all at once. ``ConfigError`` if the kernel does not promise so
    much."""
    kind = np.dtype(dtype)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    try:
        room = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"a table was to reserve {num_bytes} bytes of memory, and the kernel says: {error}; give it a smaller "
            "budget"
        ) from None
    if in_order and num_bytes >= _LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            room.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(room, kind, num_bytes // kind.itemsize).reshape(shape)


def release(array: npt.NDArray[Any], num_entries: int) -> None:
    """Give back the memory of the first entries of an array that ``zeros`` made, or of a field of one: they are zeros
    again, but for what shares a page with entries that stay."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    room: Any = base.obj if isinstance(base, memoryview) else base
    num_bytes = num_entries * array.strides[0] // mmap.PAGESIZE * mmap.PAGESIZE
    if num_bytes and hasattr(mmap, "MADV_DONTNEED"):
        room.madvise(mmap.MADV_DONTNEED, 0, num_bytes)
