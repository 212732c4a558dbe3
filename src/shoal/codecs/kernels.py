"""The inner loops of the codecs on a CPU, compiled by numba. ``plain.py`` says the same in torch, bit for bit.

Import it only where a kernel runs: numba takes half a second to load, and a kernel about a second to compile, once a
machine. All are functions of their arguments alone, on one thread, without the interpreter's lock. Arrays are
contiguous, and as long as ``plain.py`` says: nothing is checked here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32 as f32
from numpy import int8 as i8
from numpy import int32 as i32
from numpy import uint8 as u8
from numpy import uint32 as u32
from numpy.typing import NDArray

from shoal.codecs.noise import MULTIPLIER_1, MULTIPLIER_2
from shoal.compiling import kernel

Array = NDArray[Any]

MAGNITUDE = i32(0x7FFFFFFF)
TINY = f32(2.0**-119)
NAN = f32(np.nan)
CHUNK = 1 << 14
"""Entries that a pass over a vector leaves in the cache for the next pass."""

M1, M2 = u32(MULTIPLIER_1), u32(MULTIPLIER_2)


@kernel
def _mix(x: u32) -> u32:
    x = u32(u32(x ^ (x >> u32(16))) * M1)
    x = u32(u32(x ^ (x >> u32(15))) * M2)
    return u32(x ^ (x >> u32(16)))


@kernel
def _uniform(counter: int, key: tuple[u32, u32]) -> f32:
    return f32(_mix(u32(_mix(u32(u32(counter) + key[0])) + key[1])) >> u32(8)) * f32(2.0**-24)


@kernel
def _tops(bits: Array, block: int, tops: Array) -> None:
    """Each block's greatest magnitude. As integers they are ordered as the floats are, infinity and NaN at the top."""
    for b in range(tops.size):
        top = i32(0)
        for i in range(b * block, min((b + 1) * block, bits.size)):
            top = max(top, i32(bits[i] & MAGNITUDE))
        tops[b] = top


@kernel
def _factor(scales: Array, b: int, most: f32) -> f32:
    """Turn a greatest magnitude into a scale. What entries are multiplied with: 0 if all codes are to be 0."""
    top = scales[b]
    scales[b] = top / most
    if not top < f32(np.inf):
        scales[b] = NAN
        return f32(0)
    if top < TINY:
        scales[b] = f32(0)
        return f32(0)
    factor: f32 = most / top
    return factor


@kernel
def _randomly(scaled: f32, most: f32, u: f32) -> f32:
    return min(max(np.floor(scaled + u), -most), most)


@kernel
def int8_encode(vector: Array, scales: Array, codes: Array, block: int, words: tuple[int, int] | None) -> None:
    """``plain.int8_encode``, a few blocks at a time, so that the second look at an entry finds it in the cache."""
    blocks = max(1, CHUNK // block)
    for first in range(0, scales.size, blocks):
        start, end = first * block, (first + blocks) * block
        x, s, q = vector[start:end], scales[first : first + blocks], codes[start:end].view(i8)
        _tops(x.view(i32), block, s.view(i32))
        if words is None:
            _int8_nearest(x, s, q, block)
        else:
            _int8_randomly(x, s, q, start, block, words)


@kernel
def _int8_nearest(vector: Array, scales: Array, codes: Array, block: int) -> None:
    for b in range(scales.size):
        factor = _factor(scales, b, f32(127))
        x, q = vector[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        if factor == f32(0):
            q[:] = i8(0)
        else:
            for i in range(q.size):
                q[i] = i8(np.rint(x[i] * factor))


@kernel
def _int8_randomly(vector: Array, scales: Array, codes: Array, start: int, block: int, words: tuple[int, int]) -> None:
    key, most = (u32(words[0]), u32(words[1])), f32(127)
    for b in range(scales.size):
        factor = _factor(scales, b, most)
        x, q = vector[b * block : (b + 1) * block], codes[b * block : (b + 1) * block]
        if factor == f32(0):
            q[:] = i8(0)
        else:
            for i in range(q.size):
                q[i] = i8(_randomly(x[i] * factor, most, _uniform(start + b * block + i, key)))


@kernel
def int8_decode(scales: Array, codes: Array, block: int, out: Array, add: bool) -> None:
    """``plain.int8_decode``."""
    signed = codes.view(i8)
    for b in range(scales.size):
        start = b * block
        scale, q, o = scales[b], signed[start : start + block], out[start : start + block]
        if add:
            for i in range(o.size):
                o[i] += f32(q[i]) * scale
        else:
            for i in range(o.size):
                o[i] = f32(q[i]) * scale


@kernel
def int4_encode(vector: Array, scales: Array, codes: Array, block: int, words: tuple[int, int] | None) -> None:
    """``plain.int4_encode``, a few blocks at a time."""
    blocks = max(1, CHUNK // block)
    for first in range(0, scales.size, blocks):
        start, end = first * block, (first + blocks) * block
        x, s, q = vector[start:end], scales[first : first + blocks], codes[start // 2 : end // 2]
        _tops(x.view(i32), block, s.view(i32))
        if words is None:
            _int4_nearest(x, s, q, block)
        else:
            _int4_randomly(x, s, q, start, block, words)


@kernel
def _int4_nearest(vector: Array, scales: Array, codes: Array, block: int) -> None:
    """Both halves of a byte at once: 8 + low + 16 (8 + high), exact as float32."""
    for b in range(scales.size):
        factor = _factor(scales, b, f32(7))
        x, q = vector[b * block : (b + 1) * block], codes[b * block // 2 : (b + 1) * block // 2]
        low, high = x[: q.size], x[q.size :]
        if factor == f32(0):
            q[:] = u8(0x88)
            continue
        for i in range(high.size):
            q[i] = u8(np.rint(low[i] * factor) + f32(16) * np.rint(high[i] * factor) + f32(136))
        for i in range(high.size, q.size):
            q[i] = u8(np.rint(low[i] * factor) + f32(136))


@kernel
def _int4_randomly(vector: Array, scales: Array, codes: Array, start: int, block: int, words: tuple[int, int]) -> None:
    key, most = (u32(words[0]), u32(words[1])), f32(7)
    for b in range(scales.size):
        factor = _factor(scales, b, most)
        x, q = vector[b * block : (b + 1) * block], codes[b * block // 2 : (b + 1) * block // 2]
        low, high, at = x[: q.size], x[q.size :], start + b * block
        if factor == f32(0):
            q[:] = u8(0x88)
            continue
        for i in range(q.size):
            q[i] = u8(_randomly(low[i] * factor, most, _uniform(at + i, key)) + f32(136))
        for i in range(high.size):
            u = _uniform(at + q.size + i, key)
            q[i] = u8(f32(q[i]) + f32(16) * _randomly(high[i] * factor, most, u))


@kernel
def int4_decode(scales: Array, codes: Array, block: int, out: Array, add: bool) -> None:
    """``plain.int4_decode``."""
    for b in range(scales.size):
        start = b * block
        scale, q, o = scales[b], codes[start // 2 : (start + block) // 2], out[start : start + block]
        half = q.size
        low, high = o[:half], o[half:]
        if add:
            for i in range(half):
                low[i] += f32(i8(q[i] & u8(15)) - i8(8)) * scale
            for i in range(high.size):
                high[i] += f32(i8(q[i] >> u8(4)) - i8(8)) * scale
        else:
            for i in range(half):
                low[i] = f32(i8(q[i] & u8(15)) - i8(8)) * scale
            for i in range(high.size):
                high[i] = f32(i8(q[i] >> u8(4)) - i8(8)) * scale


@kernel
def _mean_magnitude(x: Array, sums: Array) -> f32:
    """Summed in halves, as ``plain.py`` does it; ``sums`` is as long as half a block."""
    half = sums.size
    for i in range(half):
        sums[i] = abs(x[i]) if i < x.size else f32(0)
    for i in range(x.size - half):
        sums[i] += abs(x[half + i])
    while half > 1:
        half //= 2
        for i in range(half):
            sums[i] += sums[half + i]
    mean = sums[0] / f32(x.size)
    if not mean < f32(np.inf):
        return NAN
    return f32(0) if mean < TINY else mean


@kernel
def one_bit_encode(vector: Array, scales: Array, codes: Array, block: int) -> None:
    """``plain.one_bit_encode``."""
    bits, sums = vector.view(i32), np.empty(block // 2, f32)
    for b in range(scales.size):
        start = b * block
        scales[b] = _mean_magnitude(vector[start : start + block], sums)
        x, q = bits[start : start + block], codes[start // 8 : (start + block) // 8]
        for i in range(q.size):
            q[i] = u8(x[i] < 0)
        for plane in range(1, 8):
            ours = x[plane * q.size : (plane + 1) * q.size]
            for i in range(ours.size):
                q[i] |= u8(ours[i] < 0) << u8(plane)


@kernel
def one_bit_decode(scales: Array, codes: Array, block: int, out: Array, add: bool) -> None:
    """``plain.one_bit_decode``."""
    for b in range(scales.size):
        start = b * block
        scale, q, o = scales[b], codes[start // 8 : (start + block) // 8], out[start : start + block]
        for plane in range(8):
            ours = o[plane * q.size : (plane + 1) * q.size]
            if add:
                for i in range(ours.size):
                    ours[i] += -scale if (q[i] >> u8(plane)) & u8(1) else scale
            else:
                for i in range(ours.size):
                    ours[i] = -scale if (q[i] >> u8(plane)) & u8(1) else scale


@kernel
def one_bit_keep(vector: Array, scales: Array, codes: Array, block: int, out: Array) -> None:
    """``plain.one_bit_keep``."""
    for b in range(scales.size):
        start = b * block
        scale, q = scales[b], codes[start // 8 : (start + block) // 8]
        x, o = vector[start : start + block], out[start : start + block]
        for plane in range(8):
            theirs, ours = x[plane * q.size : (plane + 1) * q.size], o[plane * q.size : (plane + 1) * q.size]
            for i in range(ours.size):
                ours[i] = theirs[i] - (-scale if (q[i] >> u8(plane)) & u8(1) else scale)


@kernel
def top_k(vector: Array, values: Array, indices: Array) -> None:
    """By counting: the upper 16 bits of the magnitudes, then the lower 15 of those that share the k-th one's upper."""
    bits = vector.view(i32)
    counts = np.zeros(1 << 16, i32)
    for v in bits:
        counts[(v & MAGNITUDE) >> 15] += 1
    high, above = _level(counts, values.size)
    candidates = np.empty(above + counts[high], i32)
    at = 0
    for i in range(bits.size):
        if (bits[i] & MAGNITUDE) >> 15 >= high:
            candidates[at] = i
            at += 1
    counts[:] = 0
    for i in candidates:
        if (bits[i] & MAGNITUDE) >> 15 == high:
            counts[bits[i] & 0x7FFF] += 1
    low, closer = _level(counts, values.size - above)
    threshold, ties, at = (high << 15) | low, values.size - above - closer, 0
    for i in candidates:
        magnitude = bits[i] & MAGNITUDE
        if magnitude > threshold or (magnitude == threshold and ties > 0):
            values[at], indices[at] = vector[i], i
            at += 1
            if magnitude == threshold:
                ties -= 1


@kernel
def _level(counts: Array, need: int) -> tuple[int, int]:
    """The level at which ``need`` are counted from the top, and how many are above it."""
    level, above = counts.size - 1, 0
    while above + counts[level] < need:
        above += counts[level]
        level -= 1
    return level, above


@kernel
def tree_sum(rows: Array, sums: Array) -> None:
    """``plain.tree_sum``, on the flat entries: loops compile in much less time than operations on rows."""
    flat, width, half = rows.ravel(), rows.shape[1], 1
    while 2 * half < rows.shape[0]:
        half *= 2
    halves = np.zeros(half * width)
    for i in range(min(halves.size, flat.size)):
        halves[i] = flat[i]
    for i in range(flat.size - halves.size):
        halves[i] += flat[halves.size + i]
    while half > 1:
        half //= 2
        for i in range(half * width):
            halves[i] += halves[half * width + i]
    for i in range(width):
        sums[i] = halves[i]


@kernel
def outer_sum(p: Array, q: Array, out: Array) -> None:
    """``plain.outer_sum``."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = p[i, 0] * q[0, j]
        for k in range(1, q.shape[0]):
            for j in range(out.shape[1]):
                out[i, j] += p[i, k] * q[k, j]
