"""What rides an all-reduce: three members, of whom each sums what all of them yield."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import pytest
import torch
from torch import Tensor

from shoal.codecs import Cast, LinearCodec, PowerSGD, RandomK, State, Summed
from tests.codecs.cases import KEY, gradient, same_bits

SHAPES = ((30, 20), (20,), (), (16, 3, 5, 5), (2, 2), (1, 40), (5, 1))
SIZE = sum(prod(shape) for shape in SHAPES)

CODECS: dict[str, LinearCodec] = {
    "bf16": Cast(),
    "fp16": Cast("fp16"),
    "random k": RandomK(SIZE // 10),
    "random k, unbiased": RandomK(SIZE // 10, feedback=False),
    "power sgd": PowerSGD(rank=2),
    "power sgd of rank 1": PowerSGD(rank=1),
}
every_linear_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
SUM_ERROR = {"bf16": 0.02, "fp16": 2e-3}
"""What a cast's sums may lose, relative to the greatest; all others are float32."""


def members(num_entries: int = SIZE, seed: int = 0) -> list[Tensor]:
    return [gradient(num_entries, seed=10 * seed + rank) for rank in range(3)]


def all_reduce(codec: LinearCodec, vectors: Sequence[Tensor], state: State, shapes: tuple = SHAPES) -> list[Summed]:
    """What every member ends with; each gets a tensor of its own with the sum."""
    rounds = [codec.rounds(vector, shapes, state, KEY) for vector in vectors]
    yielded, results = [next(one) for one in rounds], []
    while not results:
        assert all(sent.ndim == 1 and sent.is_contiguous() for sent in yielded)
        for sent in yielded[1:]:
            yielded[0] += sent  # in place, as a collective does it
        total = yielded[0]
        yielded = []
        for one in rounds:
            try:
                yielded.append(one.send(total.clone()))
            except StopIteration as end:
                results.append(end.value)
    return results


@every_linear_codec
def test_every_member_ends_with_the_same_bits(codec: LinearCodec) -> None:
    first, *others = all_reduce(codec, members(), codec.init(SHAPES))
    for other in others:
        assert same_bits(first.total, other.total)
        assert len(first.state) == len(other.state)
        assert all(same_bits(mine, theirs) for mine, theirs in zip(first.state, other.state, strict=True))


@every_linear_codec
def test_what_the_members_contributed_sums_to_the_total(codec: LinearCodec) -> None:
    results = all_reduce(codec, members(), codec.init(SHAPES))
    error = SUM_ERROR.get(codec.dtype, 0) if isinstance(codec, Cast) else 1e-5
    total = torch.stack([result.own for result in results]).sum(0)
    assert total.dtype == results[0].total.dtype == torch.float32
    assert (total - results[0].total).abs().max() <= error * total.abs().max()


@every_linear_codec
def test_a_member_only_reads_its_vector(codec: LinearCodec) -> None:
    vectors = members()
    all_reduce(codec, vectors, codec.init(SHAPES))
    assert all(same_bits(vector, kept) for vector, kept in zip(vectors, members(), strict=True))


@every_linear_codec
def test_what_is_no_number_shows_on_every_member(codec: LinearCodec) -> None:
    vectors = members()
    vectors[1][17] = torch.nan
    assert not any(result.total.isfinite().all() for result in all_reduce(codec, vectors, codec.init(SHAPES)))


@pytest.mark.parametrize("codec", [Cast(), Cast("fp16"), RandomK(400)], ids=str)
def test_a_group_of_one_gets_what_the_payload_decodes_to(codec: LinearCodec) -> None:
    (vector, *_), out = members(), torch.empty(SIZE)
    codec.decode(codec.encode(vector, KEY), KEY, out)
    (alone,) = all_reduce(codec, [vector], ())
    assert same_bits(alone.total, out)
    assert same_bits(alone.own, out)


def test_power_sgd_sends_what_would_not_get_smaller_as_it_is() -> None:
    vectors = members()
    (result, *_) = all_reduce(PowerSGD(2), vectors, PowerSGD(2).init(SHAPES))
    expected = vectors[0] + vectors[1] + vectors[2]
    start = 0
    for shape in SHAPES:
        end = start + prod(shape)
        if shape not in {(30, 20), (16, 3, 5, 5)}:
            assert torch.equal(result.total[start:end], expected[start:end])
        start = end


def test_power_sgd_sends_a_matrix_of_its_rank_whole() -> None:
    rng = torch.Generator().manual_seed(0)
    columns = torch.randn(50, 3, generator=rng)
    vectors = [(columns @ torch.randn(3, 40, generator=rng)).view(-1) for _ in range(3)]
    codec, shapes = PowerSGD(rank=3), ((50, 40),)
    (result, *_) = all_reduce(codec, vectors, codec.init(shapes), shapes)
    torch.testing.assert_close(result.total, torch.stack(vectors).sum(0), rtol=1e-4, atol=1e-4)


def test_power_sgd_comes_near_the_best_of_its_rank_with_a_warm_start() -> None:
    vector = gradient(50 * 40)
    codec, shapes = PowerSGD(rank=4), ((50, 40),)
    state, errors = codec.init(shapes), []
    for _ in range(40):
        (result,) = all_reduce(codec, [vector], state, shapes)
        state = result.state
        errors.append((result.total - vector).norm())
    best = torch.linalg.svdvals(vector.view(50, 40))[4:].norm()
    assert best <= errors[-1] < 1.02 * best
    assert errors[-1] < errors[0]


def test_power_sgd_goes_on_after_gradients_of_zero_and_of_no_number() -> None:
    codec, shapes = PowerSGD(rank=2), ((30, 20),)
    state = codec.init(shapes)
    for bad in (0.0, torch.nan):
        (result,) = all_reduce(codec, [torch.full((600,), bad)], state, shapes)
        state = result.state
    (result,) = all_reduce(codec, [gradient(600)], state, shapes)
    assert result.total.isfinite().all()
    assert result.total.norm() > 0


def test_power_sgd_projects_onto_orthonormal_columns_of_a_matrix_of_lower_rank() -> None:
    vector = torch.ones(30, 20).view(-1)
    codec, shapes = PowerSGD(rank=4), ((30, 20),)
    (result,) = all_reduce(codec, [vector], codec.init(shapes), shapes)
    torch.testing.assert_close(result.total, vector)


def test_the_first_state_is_the_same_everywhere_and_lies_in_the_shape_of_the_columns() -> None:
    first, again = PowerSGD(2).init(SHAPES), PowerSGD(2).init(SHAPES)
    assert [tuple(q.shape) for q in first] == [(20, 2), (75, 2)]
    assert all(same_bits(one, other) for one, other in zip(first, again, strict=True))
