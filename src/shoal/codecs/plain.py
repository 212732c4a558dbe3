"""``kernels.py`` in torch, bit for bit: for tensors that are not on a CPU, and to test the kernels against.

In those of codecs ``vector`` and ``out`` are (n,) float32, ``scales`` (ceil(n / block),) float32, and ``codes`` uint8.
A block is ``block`` entries that lie side by side; the last may be shorter. Where a byte holds several entries of a
block, it takes them from as many runs of that block, so that loops go over neighbours: of a block of 8 entries at 4
bits, byte 0 holds entries 0 (in the low bits) and 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.codecs.noise import Words, uniform

TINY = 2.0**-119
"""A block below this is sent as zeros: its scale would be subnormal, and not every machine computes with such."""


def int8_encode(vector: Tensor, scales: Tensor, codes: Tensor, block: int, words: Words | None) -> None:
    """One signed byte an entry: round(127 x / (the block's greatest magnitude))."""
    noise = None if words is None else uniform(vector.numel(), words, vector.device)
    for rows, scale, bytes_, u in _parts(block, 1, vector, scales, codes, noise):
        bytes_.view(torch.int8).copy_(_quantized(rows, scale, 127, u))


def int8_decode(scales: Tensor, codes: Tensor, block: int, out: Tensor, add: bool) -> None:
    """Byte times scale."""
    for rows, scale, bytes_, _ in _parts(block, 1, out, scales, codes):
        _put(rows, bytes_.view(torch.int8) * scale, add)


def int4_encode(vector: Tensor, scales: Tensor, codes: Tensor, block: int, words: Words | None) -> None:
    """Half a byte an entry: 8 + round(7 x / (the block's greatest magnitude))."""
    noise = None if words is None else uniform(vector.numel(), words, vector.device)
    for rows, scale, bytes_, u in _parts(block, 2, vector, scales, codes, noise):
        quantized = (_quantized(rows, scale, 7, u) + 8).to(torch.uint8)
        low, high = _runs(quantized, 2, fill=8).unbind(1)
        bytes_.copy_(low | high << 4)


def int4_decode(scales: Tensor, codes: Tensor, block: int, out: Tensor, add: bool) -> None:
    """(Half byte less 8) times scale."""
    for rows, scale, bytes_, _ in _parts(block, 2, out, scales, codes):
        halves = torch.cat([bytes_ & 15, bytes_ >> 4], dim=1)[:, : rows.shape[1]]
        _put(rows, (halves.to(torch.int8) - 8) * scale, add)


def one_bit_encode(vector: Tensor, scales: Tensor, codes: Tensor, block: int) -> None:
    """A bit an entry, set if it is negative; the scale is the mean magnitude."""
    for rows, scale, bytes_, _ in _parts(block, 8, vector, scales, codes):
        scale.copy_(_mean_magnitude(rows, block))
        negative = _runs((rows.view(torch.int32) < 0).to(torch.uint8), 8, fill=0)
        planes = negative << torch.arange(8, dtype=torch.uint8, device=rows.device).view(8, 1)
        bytes_.copy_(planes.sum(1, dtype=torch.uint8))


def one_bit_decode(scales: Tensor, codes: Tensor, block: int, out: Tensor, add: bool) -> None:
    """Plus or minus the scale."""
    for rows, scale, bytes_, _ in _parts(block, 8, out, scales, codes):
        bits = torch.cat([bytes_ >> plane & 1 for plane in range(8)], dim=1)[:, : rows.shape[1]]
        _put(rows, torch.where(bits.bool(), -scale, scale), add)


def one_bit_keep(vector: Tensor, scales: Tensor, codes: Tensor, block: int, out: Tensor) -> None:
    """What is left of the vector."""
    one_bit_decode(scales, codes, block, out, add=False)
    torch.sub(vector, out, out=out)


def top_k(vector: Tensor, values: Tensor, indices: Tensor) -> None:
    """The k entries of greatest magnitude by rising index; of equal ones, those with the lower index."""
    magnitudes = vector.view(torch.int32) & 0x7FFFFFFF
    threshold = magnitudes.topk(values.numel()).values[-1]
    above = (magnitudes > threshold).nonzero().view(-1)
    level = (magnitudes == threshold).nonzero().view(-1)[: values.numel() - above.numel()]
    chosen = torch.cat([above, level]).sort().values
    values.copy_(vector[chosen])
    indices.copy_(chosen)


def tree_sum(rows: Tensor, sums: Tensor) -> None:
    """Over the rows of (r, c) float64, by halves, into (c,)."""
    size = 1 << (rows.shape[0] - 1).bit_length()
    halves = F.pad(rows, (0, 0, 0, size - rows.shape[0]))
    while halves.shape[0] > 1:
        half = halves.shape[0] // 2
        halves = halves[:half] + halves[half:]
    sums.copy_(halves[0])


def outer_sum(p: Tensor, q: Tensor, out: Tensor) -> None:
    """The sum over k of p (rows, r) times q (r, columns), the lowest k first, into (rows, columns), all float32."""
    torch.mul(p[:, :1], q[0], out=out)
    for k in range(1, q.shape[0]):
        out.add_(p[:, k : k + 1] * q[k])


def _parts(
    block: int, per_byte: int, entries: Tensor, scales: Tensor, codes: Tensor, noise: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """All whole blocks as rows, then the last if it is shorter: entries, scales (rows, 1), codes, noise."""
    blocks = entries.numel() // block
    whole, bytes_ = blocks * block, blocks * block // per_byte
    for rows, one, other, third in (
        (blocks, slice(whole), slice(blocks), slice(bytes_)),
        (1, slice(whole, None), slice(blocks, None), slice(bytes_, None)),
    ):
        if entries[one].numel():
            u = None if noise is None else noise[one].view(rows, -1)
            yield entries[one].view(rows, -1), scales[other].view(rows, 1), codes[third].view(rows, -1), u


def _quantized(rows: Tensor, scale: Tensor, most: int, u: Tensor | None) -> Tensor:
    """Integers of magnitude up to ``most``, as float32; the scales are written."""
    top = (rows.view(torch.int32) & 0x7FFFFFFF).amax(1, keepdim=True).view(torch.float32)
    finite, tiny = top.isfinite(), top < TINY
    levels = torch.full_like(top, most)  # a tensor: where one side is a number, torch may multiply by a reciprocal
    scale.copy_(torch.where(finite, torch.where(tiny, 0, top / levels), torch.nan))
    scaled = torch.where(finite & ~tiny, rows * (levels / top), 0)
    return scaled.round() if u is None else (scaled + u).floor().clamp(-most, most)


def _mean_magnitude(rows: Tensor, block: int) -> Tensor:
    """Summed in halves, so that the order of the sum is the same everywhere."""
    sums = F.pad(rows.abs(), (0, block - rows.shape[1]))
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    mean = sums / torch.full_like(sums, rows.shape[1])
    return torch.where(mean.isfinite(), torch.where(mean < TINY, 0, mean), torch.nan)


def _runs(entries: Tensor, num_runs: int, fill: int) -> Tensor:
    """(rows, width) as (rows, num_runs, ceil(width / num_runs)), filled up."""
    rows, width = entries.shape
    return F.pad(entries, (0, -width % num_runs), value=fill).view(rows, num_runs, -1)


def _put(out: Tensor, decoded: Tensor, add: bool) -> None:
    out.add_(decoded) if add else out.copy_(decoded)
