"""What a batch's ids come to: the distinct ones, whose shards they are, and gradients summed for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import int64 as i64
from numpy import uint64 as u64

from shoal.compiling import kernel
from shoal.tables.kernels import mix
from shoal.tables.prefetch import prefetch
from shoal.tables.spec import NUM_BUCKETS

Ids = npt.NDArray[np.int64]
Index = npt.NDArray[np.int32]

_AHEAD = 12
_BUCKETS = u64(NUM_BUCKETS - 1)


def distinct(ids: Ids) -> tuple[Ids, Index]:
    """(n,) ids -> (m,) distinct ids in the order in which they first come, and (n,) for each id its place there."""
    capacity = 1 << max(4, int(2 * len(ids)).bit_length())
    places, unique, inverse = np.zeros(capacity, np.int32), np.empty(len(ids), np.int64), np.empty(len(ids), np.int32)
    count = _distinct(ids, places, unique, inverse)
    return unique[:count], inverse


@kernel
def _distinct(ids: Any, places: Any, unique: Any, inverse: Any) -> int:
    mask = u64(places.size - 1)
    count = 0
    for i in range(ids.size):
        if i + _AHEAD < ids.size:
            prefetch(places, i64(mix(u64(ids[i + _AHEAD])) & mask))
        place = i64(mix(u64(ids[i])) & mask)
        while places[place] != 0 and unique[places[place] - 1] != ids[i]:
            place = i64(u64(place + 1) & mask)
        if places[place] == 0:
            unique[count] = ids[i]
            count += 1
            places[place] = i32(count)
        inverse[i] = places[place] - 1
    return count


def sums(gradients: npt.NDArray[np.float32], inverse: Index, num: int) -> npt.NDArray[np.float32]:
    """(n, dim) gradients -> (num, dim): those of one place are added up, in order."""
    out = np.zeros((num, gradients.shape[1]), np.float32)
    _add_up(gradients, inverse, out)
    return out


@kernel
def _add_up(gradients: Any, inverse: Any, out: Any) -> None:
    for i in range(inverse.size):
        place = inverse[i]
        for j in range(out.shape[1]):
            out[place, j] += gradients[i, j]


@kernel
def buckets_of(ids: Any) -> Any:
    """(n,) ids -> (n,) int32 buckets: the last 12 bits of their hashes, for the first tell an id's place."""
    out = np.empty(ids.size, i32)
    for i in range(ids.size):
        out[i] = i32(mix(u64(ids[i])) & _BUCKETS)
    return out


@kernel
def by_owner(ids: Any, owners: Any, num: int) -> Any:
    """(n,) ids and (4096,) their buckets' owners -> (n,) int32, the ids' places with those of an owner side by side,
    and (num + 1,) int64, where each owner's begin."""
    mine = np.empty(ids.size, i32)
    starts = np.zeros(num + 1, i64)
    for i in range(ids.size):
        mine[i] = owners[i64(mix(u64(ids[i])) & _BUCKETS)]
        starts[mine[i] + 1] += 1
    for k in range(num):
        starts[k + 1] += starts[k]
    at = starts[:num].copy()
    order = np.empty(ids.size, i32)
    for i in range(ids.size):
        order[at[mine[i]]] = i32(i)
        at[mine[i]] += 1
    return order, starts


@kernel
def halved(rows: Any) -> Any:
    """(n, dim) float32 -> (n, dim) uint16: bfloat16, rounded to the nearest, ties to even."""
    words = rows.view(np.uint32)
    out = np.empty(rows.shape, np.uint16)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            word = words[i, j]
            out[i, j] = np.uint16(
                (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            )
    return out


@kernel
def doubled(halves: Any) -> Any:
    """The other way round."""
    out = np.empty(halves.shape, f32)
    words = out.view(np.uint32)
    for i in range(halves.shape[0]):
        for j in range(halves.shape[1]):
            words[i, j] = np.uint32(halves[i, j]) << np.uint32(16)
    return out


def warm_up() -> None:
    """Have these loops compiled, or found on disk, before a process is forked that needs them."""
    ids, rows = np.arange(2), np.zeros((2, 1), np.float32)
    unique, inverse = distinct(ids)
    sums(rows, inverse, len(unique))
    by_owner(ids, np.zeros(1 << 12, np.int32), 1)
    doubled(halved(rows))
