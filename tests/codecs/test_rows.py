"""A codec's rows: one compiled call says what calls row by row say."""

from __future__ import annotations

import pytest
import torch

import shoal
from shoal.codecs.rows import Cut, _Each, rows_for, warm_up_rows

CODECS = (
    shoal.Int8(), shoal.Int8(block=32, stochastic=True), shoal.Int4(), shoal.Int4(stochastic=True),
    shoal.OneBit(), shoal.OneBit(block=64), shoal.Int8(block=1 << 16),
)  # fmt: skip
SIZES = (1, 1023, 4 * 1024, 70_001, 200_000)
NUM_ROWS = 4


def vectors(size: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keeps", [False, True])
def test_all_rows_at_once_have_the_bits_of_row_by_row(codec, size, keeps):
    cut = Cut(size, NUM_ROWS)
    both = [rows_for(codec, cut, "cpu"), _Each(codec, cut)]
    assert not isinstance(both[0], _Each)
    found = []
    for rows in both:
        members = []
        for own, vector in enumerate(vectors(size, NUM_ROWS)):
            sent = torch.zeros(NUM_ROWS, rows.payload_bytes, dtype=torch.uint8)
            room = torch.zeros(size) if keeps else None
            residual = vectors(size, NUM_ROWS + 1)[-1] if keeps else None
            rows.encode(vector, sent, own, 7, residual, room)
            members.append((vector, sent, room))
        gathered = torch.zeros(NUM_ROWS, rows.payload_bytes, dtype=torch.uint8)
        for own, (vector, _, room) in enumerate(members):
            received = torch.stack([sent[own] for _, sent, _ in members])
            rows.sum(vector, received, own, 7, gathered[own], room)
        for vector, _, _ in members:
            rows.decode(gathered, 7, vector)
        found.append((gathered, *(tensor for member in members for tensor in member if tensor is not None)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    sums = found[0][1::3] if keeps else found[0][1::2]
    assert all(torch.equal(sums[0], other) for other in sums)


def test_what_is_kept_and_what_is_sent_make_up_the_whole():
    size = 50_000
    cut, before = Cut(size, NUM_ROWS), vectors(size, NUM_ROWS)
    rows = rows_for(shoal.OneBit(), cut, "cpu")
    ours, rooms = [v.clone() for v in before], [torch.zeros(size) for _ in before]
    sent = [torch.zeros(NUM_ROWS, rows.payload_bytes, dtype=torch.uint8) for _ in before]
    gathered = torch.zeros(NUM_ROWS, rows.payload_bytes, dtype=torch.uint8)
    for own in range(NUM_ROWS):
        rows.encode(ours[own], sent[own], own, 3, None, rooms[own])
    for own in range(NUM_ROWS):
        rows.sum(ours[own], torch.stack([s[own] for s in sent]), own, 3, gathered[own], rooms[own])
    rows.decode(gathered, 3, ours[0])
    torch.testing.assert_close(ours[0] + sum(rooms), sum(before), rtol=1e-5, atol=1e-5)


def test_other_codecs_go_row_by_row():
    assert isinstance(rows_for(shoal.TopK(k=50), Cut(5000, 2), "cpu"), _Each)
    warm_up_rows(shoal.TopK(k=50), 5000)
