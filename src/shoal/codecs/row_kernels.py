"""What a compressed collective does with many rows at once, compiled: codecs' loops, a cacheful after another.

Each says in one call what calls of the codecs' own loops, row by row, say bit for bit; a call costs as much as a loop
over thousands of entries. Rows are ranges of ``row`` entries, the last of which may be shorter or missing. An array of
size 0 stands for none.
"""

from __future__ import annotations

from numpy import float32 as f32

from shoal.codecs.kernels import (
    CHUNK,
    Array,
    int4_decode,
    int4_encode,
    int8_decode,
    int8_encode,
    one_bit_decode,
    one_bit_encode,
    one_bit_keep,
)
from shoal.compiling import kernel

Form = tuple[int, int, tuple[int, int] | None]
"""A codec's ``Form``: bits, block, and the key's words where rounding is random."""


@kernel
def _parts(payload: Array, bits: int, block: int, num_entries: int) -> tuple[Array, Array]:
    """A payload's scales and codes."""
    end = 4 * ((num_entries + block - 1) // block)
    return payload[:end].view(f32), payload[end : end + (num_entries * bits + 7) // 8]


@kernel
def _encode(bits: int, x: Array, scales: Array, codes: Array, block: int, words: tuple[int, int] | None) -> None:
    if bits == 8:
        int8_encode(x, scales, codes, block, words)
    elif bits == 4:
        int4_encode(x, scales, codes, block, words)
    else:
        one_bit_encode(x, scales, codes, block)


@kernel
def _decode(bits: int, scales: Array, codes: Array, block: int, out: Array, add: bool) -> None:
    if bits == 8:
        int8_decode(scales, codes, block, out, add)
    elif bits == 4:
        int4_decode(scales, codes, block, out, add)
    else:
        one_bit_decode(scales, codes, block, out, add)


@kernel
def _keep(bits: int, x: Array, scales: Array, codes: Array, block: int, room: Array) -> None:
    """What encoding ``x`` left behind."""
    if bits == 1:
        one_bit_keep(x, scales, codes, block, room)
    else:
        _decode(bits, scales, codes, block, room, False)
        for i in range(x.size):
            room[i] = x[i] - room[i]


@kernel
def _step(num_entries: int, block: int, words: tuple[int, int] | None) -> int:
    """How many entries are done with before the next: all where random numbers count entries from the row's start."""
    return max(block, CHUNK) if words is None else max(1, num_entries)


@kernel
def _encode_row(form: Form, x: Array, payload: Array, room: Array) -> None:
    bits, block, words = form
    scales, codes = _parts(payload, bits, block, x.size)
    step = _step(x.size, block, words)
    for low in range(0, x.size, step):
        high = min(low + step, x.size)
        s = scales[low // block : (high + block - 1) // block]
        q = codes[low * bits // 8 : (high * bits + 7) // 8]
        _encode(bits, x[low:high], s, q, block, words)
        if room.size:
            _keep(bits, x[low:high], s, q, block, room[low:high])


@kernel
def encode_rows(
    form: Form, vector: Array, payloads: Array, which: tuple[int, int], residual: Array, room: Array
) -> None:  # fmt: skip
    """Add the residual to the vector, encode its rows but one, and leave in ``room`` what that lost. ``which``: the
    length of a row, and the one to leave out."""
    row, skip = which
    for r in range(payloads.shape[0]):
        low, high = r * row, min((r + 1) * row, vector.size)
        if high <= low:
            break
        x = vector[low:high]
        if residual.size:
            kept = residual[low:high]
            for i in range(x.size):
                x[i] += kept[i]
        if r != skip:
            _encode_row(form, x, payloads[r], room[low:high])


@kernel
def sum_rows(form: Form, total: Array, received: Array, skip: int, payload: Array, room: Array) -> None:
    """Add what all rows but ``skip`` decode to, each as long as ``total``; encode the sum, and leave what that lost."""
    bits, block, _ = form
    step = max(block, CHUNK)
    for low in range(0, total.size, step):
        high = min(low + step, total.size)
        for r in range(received.shape[0]):
            if r != skip:
                scales, codes = _parts(received[r], bits, block, total.size)
                s = scales[low // block : (high + block - 1) // block]
                _decode(bits, s, codes[low * bits // 8 : (high * bits + 7) // 8], block, total[low:high], True)
    _encode_row(form, total, payload, room)


@kernel
def decode_rows(form: Form, payloads: Array, row: int, vector: Array) -> None:
    """Write what the rows decode to."""
    bits, block, _ = form
    for r in range(payloads.shape[0]):
        low, high = r * row, min((r + 1) * row, vector.size)
        if high <= low:
            break
        scales, codes = _parts(payloads[r], bits, block, high - low)
        _decode(bits, scales, codes, block, vector[low:high], False)
