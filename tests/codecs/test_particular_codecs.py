"""What holds for one codec and not for all."""

from __future__ import annotations

import pytest
import torch

from shoal.codecs import Cast, Chain, Codec, Int4, Int8, OneBit, RandomK, TopK
from shoal.codecs.noise import hash32, uniform, words
from tests.codecs.cases import KEY, SIZES, decoded, gradient


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", [TopK, RandomK])
def test_all_entries_are_no_compression(kind: type[TopK] | type[RandomK], n: int) -> None:
    vector = gradient(n)
    assert torch.equal(decoded(kind(n), vector), vector)
    assert torch.equal(decoded(Chain(kind(n)), vector), vector)


def test_top_k_sends_the_greatest_and_of_equal_ones_the_first() -> None:
    vector = torch.tensor([1.0, -3.0, 2.0, 3.0, -2.0, 2.0])
    assert decoded(TopK(2), vector).tolist() == [0, -3, 0, 3, 0, 0]
    assert decoded(TopK(3), vector).tolist() == [0, -3, 2, 3, 0, 0]
    assert decoded(TopK(4), vector).tolist() == [0, -3, 2, 3, -2, 0]


@pytest.mark.parametrize(("kind", "levels"), [(Int8, 127), (Int4, 7)])
def test_an_entry_is_at_most_half_a_level_off(kind: type[Int8] | type[Int4], levels: int) -> None:
    vector = gradient(4096)
    off = (decoded(kind(), vector) - vector).view(-1, kind().block).abs()
    level = vector.view(-1, kind().block).abs().amax(1, keepdim=True) / levels
    assert (off <= 0.5001 * level).all()


def test_what_lies_halfway_goes_to_the_even_level() -> None:
    vector = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert decoded(Int8(), vector).tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("codec", [Int8(stochastic=True), Int4(stochastic=True), RandomK(50, feedback=False)], ids=str)
def test_the_mean_over_many_keys_is_the_vector(codec: Int8 | Int4 | RandomK) -> None:
    vector, num_keys = torch.randn(193, generator=torch.Generator().manual_seed(0)), 800
    samples = torch.stack([decoded(codec, vector, key) for key in range(num_keys)])
    error = samples.std(0).max() / num_keys**0.5
    assert ((samples.mean(0) - vector).abs() < 4.5 * error).all()
    assert error < 0.3


def test_random_k_chooses_each_entry_as_often() -> None:
    ones, num_keys = torch.ones(100), 1000
    chosen = torch.stack([decoded(RandomK(20), ones, key) for key in range(num_keys)])
    assert (chosen.sum(1) == 20).all()
    assert ((chosen.mean(0) - 0.2).abs() < 0.06).all()


def test_one_bit_sends_signs_and_the_mean_magnitude() -> None:
    vector = torch.tensor([1.0, -2.0, 3.0, -6.0, 4.0, 5.0, -0.0, 3.0, 10.0, -20.0])
    expected = [3.0, -3.0, 3.0, -3.0, 3.0, 3.0, -3.0, 3.0, 15.0, -15.0]
    assert decoded(OneBit(block=8), vector).tolist() == expected


def test_bf16_and_fp16_are_torchs() -> None:
    vector = gradient(1000)
    assert torch.equal(decoded(Cast(), vector), vector.bfloat16().float())
    assert torch.equal(decoded(Cast("fp16"), vector), vector.half().float())


def test_a_chain_sends_less_than_its_parts() -> None:
    chain = Chain(TopK(1000), Int8())
    assert chain.payload_bytes(100_000) < TopK(1000).payload_bytes(100_000) / 1.9
    assert chain.feedback
    assert not Chain(RandomK(5, feedback=False), Int8()).feedback


def test_a_chain_sends_the_values_of_its_first_codec_by_its_second() -> None:
    vector = gradient(1000)
    kept = decoded(TopK(100), vector)
    at = kept.nonzero().view(-1)
    assert torch.equal(decoded(Chain(TopK(100), Int8()), vector)[at], decoded(Int8(), kept[at]))


@pytest.mark.parametrize("codec", [Int8(), Int4(), OneBit(), Cast(), TopK(1), RandomK(1)], ids=str)
def test_great_floats_stay_finite(codec: Codec) -> None:
    assert decoded(codec, torch.tensor([1e38, -1e38])).isfinite().all()


def test_noise_is_the_same_on_every_machine() -> None:
    assert words(KEY) == (2760878749, 360331271)
    assert hash32(torch.arange(3), words(KEY)).tolist() == [1695705255, 3181911966, 4245012293]


def test_noise_is_uniform_and_differs_from_key_to_key() -> None:
    one, other = (uniform(100_000, words(key), torch.device("cpu")).double() for key in (1, 2))
    for noise in (one, other):
        assert 0 <= noise.min() < 1e-3 and 1 - 1e-3 < noise.max() < 1
        assert abs(noise.mean() - 0.5) < 0.004
        assert abs(noise.var() - 1 / 12) < 0.002
        assert abs(torch.corrcoef(torch.stack([noise[1:], noise[:-1]]))[0, 1]) < 0.012
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.012
