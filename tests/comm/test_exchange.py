"""What holds of every codec's exchange: the same bits everywhere, and nothing lost that is not in a residual."""

from __future__ import annotations

import pytest
import torch

from shoal.codecs import Cast, Chain, Int4, Int8, OneBit, PowerSGD, RandomK, TopK
from shoal.comm.exchange import Memory, Times, exchange_for
from tests.strategies.threads import on_ranks

SHAPES = ((60, 50), (7,), (1, 40))
SIZE = 3047
EVERY = {
    "none": None,
    "bf16": Cast("bf16"),
    "fp16": Cast("fp16"),
    "int8": Int8(),
    "int8, stochastic": Int8(stochastic=True),
    "int4": Int4(),
    "onebit": OneBit(),
    "topk": TopK(100),
    "randomk": RandomK(100),
    "powersgd": PowerSGD(2),
    "chain": Chain(TopK(100), Int8()),
}
WORLDS = (2, 3, 5)


def vector_of(rank, step=0):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(100 * step + rank))


def sums(group, codec, num_steps):
    """What some exchanges come to on this rank, and the residual that it ends with."""
    exchange, memory, found = exchange_for(group, codec, SIZE, SHAPES, Times()), Memory(), []
    for step in range(num_steps):
        flat = vector_of(group.seat.rank, step)
        room = torch.zeros(SIZE) if codec is not None and codec.feedback else None
        exchange.start(flat, memory, step, room)
        exchange.turn()
        exchange.end()
        memory = exchange.after
        found.append(flat)
    return found, memory.residual


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY.keys())
def test_every_rank_ends_with_the_same_bits(codec, world_size):
    first, *others = [found for found, _ in on_ranks(world_size, lambda group: sums(group, codec, 3))]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("codec", [c for c in EVERY.values() if c is not None and c.feedback], ids=repr)
def test_what_is_not_in_the_sums_is_in_the_residuals(codec, world_size):
    """After any number of steps: all that went in has come out, or is what members will send next."""
    results = on_ranks(world_size, lambda group: sums(group, codec, 4))
    put_in = sum(vector_of(rank, step) for rank in range(world_size) for step in range(4))
    came_out = sum(results[0][0])
    left = sum(residual for _, residual in results)
    torch.testing.assert_close(came_out + left, put_in, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("codec", [None, Cast("bf16"), Int8(), Int8(stochastic=True), Int4()], ids=repr)
def test_codecs_of_every_entry_come_near_the_sum(codec):
    (flat,), _ = on_ranks(3, lambda group: sums(group, codec, 1))[0]
    expected = sum(vector_of(rank) for rank in range(3))
    assert (flat - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("codec", [TopK(SIZE), RandomK(SIZE)], ids=repr)
def test_sending_every_entry_is_no_compression(codec):
    (flat,), _ = on_ranks(3, lambda group: sums(group, codec, 1))[0]
    torch.testing.assert_close(flat, sum(vector_of(rank) for rank in range(3)))


@pytest.mark.parametrize("codec", [c for c in EVERY.values() if not isinstance(c, RandomK)], ids=repr)
def test_a_number_that_is_none_shows_on_every_rank(codec):
    """But for RandomK, which shows it when it is drawn: until then it is in the residual."""

    def act(group):
        flat = vector_of(group.seat.rank)
        flat[5] = float("nan") if group.seat.rank == 1 else flat[5]
        exchange = exchange_for(group, codec, SIZE, SHAPES, Times())
        exchange.start(flat, Memory(), 0, torch.zeros(SIZE) if codec is not None and codec.feedback else None)
        exchange.turn()
        exchange.end()
        return bool(torch.isfinite(flat).all())

    assert on_ranks(3, act) == [False] * 3


def test_fewer_entries_than_ranks_leave_some_without_a_range():
    def act(group):
        exchange = exchange_for(group, Int8(), 3, ((3,),), Times())
        flat = torch.tensor([1.0, -2.0, 4.0])
        exchange.start(flat, Memory(), 0, None)
        exchange.turn()
        exchange.end()
        return flat

    for flat in on_ranks(4, act):
        torch.testing.assert_close(flat, torch.tensor([4.0, -8.0, 16.0]), rtol=0.02, atol=0.1)


def test_half_precision_goes_in_and_comes_out():
    def act(group):
        exchange = exchange_for(group, Int8(), 2000, ((2000,),), Times())
        flat = torch.ones(2000, dtype=torch.bfloat16) * (group.seat.rank + 1)
        exchange.start(flat, Memory(), 0, None)
        exchange.turn()
        exchange.end()
        return flat

    assert all(flat.dtype == torch.bfloat16 and flat.eq(3).all() for flat in on_ranks(2, act))
