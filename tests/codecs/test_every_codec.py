"""One battery over every codec: what travels, what comes back, what is kept."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import shoal.codecs
from shoal.codecs import Codec, RandomK, TopK, keep_residual, warm_up
from tests.codecs.cases import CASES, KEY, SIZES, WITH_FEEDBACK, Make, decoded, gradient, same_bits

every_codec = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
every_size = pytest.mark.parametrize("n", SIZES)
every_codec_with_feedback = pytest.mark.parametrize("make", WITH_FEEDBACK.values(), ids=WITH_FEEDBACK.keys())


def test_the_battery_covers_every_codec_of_the_package() -> None:
    exported = [getattr(shoal.codecs, name) for name in shoal.codecs.__all__]
    codecs = {kind for kind in exported if inspect.isclass(kind) and hasattr(kind, "__dataclass_fields__")}
    assert {type(make(1)) for make in CASES.values()} == codecs - {shoal.codecs.Summed}


@every_codec
def test_a_codec_satisfies_the_protocol_and_is_a_value(make: Make) -> None:
    assert isinstance(make(100), Codec)
    assert make(100) == make(100)
    assert hash(make(100)) == hash(make(100))


@every_codec
@every_size
def test_a_payload_is_as_long_as_was_said(make: Make, n: int) -> None:
    payload = make(n).encode(gradient(n), KEY)
    assert payload.dtype == torch.uint8
    assert payload.shape == (make(n).payload_bytes(n),)
    assert payload.numel() % 8 == 0


@every_codec
@every_size
def test_what_is_decoded_and_what_is_kept_make_the_whole(make: Make, n: int) -> None:
    vector, residual = gradient(n), torch.empty(n)
    keep_residual(make(n), vector, make(n).encode(vector, KEY), KEY, residual)
    assert same_bits(residual, vector - decoded(make(n), vector))
    torch.testing.assert_close(decoded(make(n), vector) + residual, vector)


@every_codec
@every_size
def test_the_same_vector_and_key_make_the_same_bits(make: Make, n: int) -> None:
    vector = gradient(n)
    kept = vector.clone()
    assert same_bits(make(n).encode(vector, KEY), make(n).encode(vector, KEY))
    assert same_bits(decoded(make(n), vector), decoded(make(n), vector))
    assert same_bits(vector, kept)


@every_codec
@every_size
def test_a_payload_is_written_into_a_row_and_nowhere_else(make: Make, n: int) -> None:
    vector, rows = gradient(n), torch.full((3, make(n).payload_bytes(n)), 77, dtype=torch.uint8)
    written = make(n).encode(vector, KEY, rows[1])
    assert written.data_ptr() == rows[1].data_ptr()
    assert same_bits(rows[1].clone(), make(n).encode(vector, KEY))
    assert (rows[[0, 2]] == 77).all()


@every_codec
@every_size
def test_decoding_can_add(make: Make, n: int) -> None:
    vector, start = gradient(n), gradient(n, seed=1)
    out = start.clone()
    make(n).decode(make(n).encode(vector, KEY), KEY, out, add=True)
    assert torch.equal(out, start + decoded(make(n), vector))


@every_codec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_the_floats_that_it_stands_for(make: Make, dtype: torch.dtype) -> None:
    half = gradient(1000).to(dtype)
    make(1000).check(dtype, 1000)
    assert same_bits(make(1000).encode(half, KEY), make(1000).encode(half.float(), KEY))


@every_codec
def test_a_vector_may_be_strided_and_need_a_gradient(make: Make) -> None:
    vector = gradient(1000)
    strided = torch.stack([vector, vector], dim=1).requires_grad_()[:, 0]
    assert same_bits(make(1000).encode(strided, KEY), make(1000).encode(vector, KEY))


@every_codec
@pytest.mark.parametrize("n", [1, 300, 1000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_shows(make: Make, n: int, bad: float) -> None:
    for at in {0, n // 2, n - 1}:
        vector = gradient(n)
        vector[at] = bad
        assert not decoded(make(n), vector).isfinite().all()


@every_codec
@pytest.mark.parametrize("n", [1, 257, 1000])
@pytest.mark.parametrize("size", [0.0, -0.0, 1e-42, 1e-30, 3e4])
def test_small_and_great_numbers_stay_what_they_are(make: Make, n: int, size: float) -> None:
    vector = gradient(n).sign() * size
    there = decoded(make(n), vector)
    assert there.isfinite().all()
    assert there.norm(p=math.inf) <= 3.1 * abs(size)


@every_codec_with_feedback
def test_the_sum_of_what_was_decoded_and_the_last_residual_is_the_sum_of_the_inputs(make: Make) -> None:
    n, residual = 1000, torch.zeros(1000)
    received, given = torch.zeros(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    for step in range(30):
        vector = gradient(n, seed=step)
        with_residual = vector + residual
        payload = make(n).encode(with_residual, step)
        keep_residual(make(n), with_residual, payload, step, residual)
        received += with_residual - residual
        given += vector
    torch.testing.assert_close(received + residual, given, rtol=0, atol=1e-3)


@every_codec_with_feedback
def test_sgd_with_feedback_reaches_the_minimum(make: Make) -> None:
    n = 64
    curvature, minimum = torch.linspace(0.5, 2, n), gradient(n, seed=1)
    parameters, residual = torch.zeros(n), torch.zeros(n)
    for step in range(500):
        vector = curvature * (parameters - minimum) + residual
        payload = make(n).encode(vector, step)
        keep_residual(make(n), vector, payload, step, residual)
        parameters -= 0.05 * (vector - residual)
    assert (parameters - minimum).norm() < 0.05 * minimum.norm()


@every_codec
def test_a_share_of_all_is_the_codec_itself(make: Make) -> None:
    assert make(1000).share(1000, 1000) == make(1000)


@every_codec
@pytest.mark.parametrize("pieces", [2, 3, 7, 100])
def test_the_shares_of_pieces_fit_them_and_are_no_smaller_than_the_whole(make: Make, pieces: int) -> None:
    vector = gradient(1000)
    for piece in vector.tensor_split(pieces):
        codec = make(1000).share(piece.numel(), 1000)
        codec.check(torch.float32, piece.numel())
        assert decoded(codec, piece).isfinite().all()


@pytest.mark.parametrize("kind", [TopK, RandomK])
def test_a_share_scales_k_and_rounds_it_up(kind: type[TopK] | type[RandomK]) -> None:
    assert kind(10).share(250, 1000) == kind(3)
    assert kind(10).share(1, 1000) == kind(1)
    assert kind(10, feedback=False).share(100, 1000) == kind(1, feedback=False)


@every_codec
def test_warming_up_needs_no_vector(make: Make) -> None:
    warm_up(make(1000))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_codec
def test_a_gpu_decodes_to_the_bits_of_a_cpu(make: Make) -> None:
    vector = gradient(4097)
    payload = make(4097).encode(vector.cuda(), KEY)
    assert payload.is_cuda
    there, here = torch.empty(4097, device="cuda"), torch.empty(4097)
    make(4097).decode(payload, KEY, there)
    make(4097).decode(payload.cpu(), KEY, here)
    assert same_bits(there.cpu(), here)
