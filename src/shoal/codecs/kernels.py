"""The inner loops of the codecs on a CPU, compiled by numba. ``plain.py`` says the same in torch, bit for bit.

Import it only where a kernel runs: numba takes half a second to load, and a kernel about a second to compile, once a
machine. All are functions of their arguments alone, on one thread, without the interpreter's lock. Arrays are
contiguous, and as long as ``plain.py`` says: nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy import float32 as f32
from numpy import int8 as i8
from numpy import int32 as i32
from numpy import uint8 as u8
from numpy import uint32 as u32
from numpy.typing import NDArray

from shoal.codecs.noise import MULTIPLIER_1, MULTIPLIER_2

F = TypeVar("F", bound=Callable[..., object])
Array = NDArray[Any]

MAGNITUDE = i32(0x7FFFFFFF)
TINY = f32(2.0**-119)
NAN = f32(np.nan)
M1, M2 = u32(MULTIPLIER_1), u32(MULTIPLIER_2)


def kernel(function: F) -> F:
    """Compiled at the first call, and kept on disk where there is a place for that."""
    try:
        compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no folder can be written to: each process compiles for itself
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled  # type: ignore[no-any-return]


@kernel
def _mix(x: u32) -> u32:
    x = u32(u32(x ^ (x >> u32(16))) * M1)
    x = u32(u32(x ^ (x >> u32(15))) * M2)
    return u32(x ^ (x >> u32(16)))


@kernel
def _uniform(i: int, low: u32, high: u32) -> f32:
    return f32(_mix(u32(_mix(u32(u32(i) + low)) + high)) >> u32(8)) * f32(2.0**-24)


@kernel
def _absmax_bits(bits: Array) -> i32:
    """As integers, magnitudes are ordered as the floats are, with infinity and NaN at the top."""
    top = i32(0)
    for v in bits:
        top = max(top, i32(v & MAGNITUDE))
    return top


@kernel
def _factors(bits: Array, scale: Array, most: f32) -> tuple[f32, f32]:
    """A block's scale, and what its entries are multiplied with; the latter is 0 where all codes are to be 0.

    ``scale`` (1,) is where the scale will be, and until then lends its place.
    """
    scale.view(i32)[0] = _absmax_bits(bits)
    top = scale[0]
    if not top < f32(np.inf):
        return NAN, f32(0)
    if top < TINY:
        return f32(0), f32(0)
    return top / most, most / top


@kernel
def _quantize_randomly(x: f32, factor: f32, most: f32, u: f32) -> f32:
    return min(max(np.floor(x * factor + u), -most), most)


@kernel
def int8_encode(vector: Array, scales: Array, codes: Array, block: int, words: tuple[int, int] | None) -> None:
    bits, signed = vector.view(i32), codes.view(i8)
    for b in range(scales.size):
        start = b * block
        x, q = vector[start : start + block], signed[start : start + block]
        scales[b], factor = _factors(bits[start : start + block], scales[b : b + 1], f32(127))
        if factor == f32(0):
            q[:] = i8(0)
        elif words is None:
            for i in range(x.size):
                q[i] = i8(np.rint(x[i] * factor))
        else:
            low, high = u32(words[0]), u32(words[1])
            for i in range(x.size):
                q[i] = i8(_quantize_randomly(x[i], factor, f32(127), _uniform(start + i, low, high)))


@kernel
def int8_decode(scales: Array, codes: Array, block: int, out: Array, add: bool) -> None:
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
    bits = vector.view(i32)
    for b in range(scales.size):
        start = b * block
        x, q = vector[start : start + block], codes[start // 2 : (start + block) // 2]
        half = q.size
        scales[b], factor = _factors(bits[start : start + block], scales[b : b + 1], f32(7))
        if factor == f32(0):
            q[:] = u8(0x88)
        elif words is None:
            for i in range(half):
                q[i] = u8(i8(np.rint(x[i] * factor)) + i8(8))
            for i in range(x.size - half):
                q[i] |= u8((i8(np.rint(x[half + i] * factor)) + i8(8)) << 4)
        else:
            low, high = u32(words[0]), u32(words[1])
            for i in range(half):
                q[i] = u8(i8(_quantize_randomly(x[i], factor, f32(7), _uniform(start + i, low, high))) + i8(8))
            for i in range(x.size - half):
                u = _uniform(start + half + i, low, high)
                q[i] |= u8((i8(_quantize_randomly(x[half + i], factor, f32(7), u)) + i8(8)) << 4)
        if x.size < 2 * half and factor != f32(0):
            q[half - 1] |= u8(0x80)


@kernel
def int4_decode(scales: Array, codes: Array, block: int, out: Array, add: bool) -> None:
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
def top_k(vector: Array, values: Array, indices: Array) -> None:
    """By counting: the upper 16 bits of the magnitudes, then the lower 15 of those that share the k-th one's upper."""
    bits, need = vector.view(i32), values.size
    upper, lower = np.zeros(1 << 16, i32), np.zeros(1 << 15, i32)
    for v in bits:
        upper[(v & MAGNITUDE) >> 15] += 1
    high = upper.size - 1
    while upper[high] < need:
        need -= upper[high]
        high -= 1
    for v in bits:
        if (v & MAGNITUDE) >> 15 == high:
            lower[v & 0x7FFF] += 1
    low = lower.size - 1
    while lower[low] < need:
        need -= lower[low]
        low -= 1
    threshold = (high << 15) | low
    at = 0
    for i in range(bits.size):
        magnitude = bits[i] & MAGNITUDE
        if magnitude > threshold or (magnitude == threshold and need > 0):
            values[at], indices[at] = vector[i], i
            at += 1
            if magnitude == threshold:
                need -= 1
