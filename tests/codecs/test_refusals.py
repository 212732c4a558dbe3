"""What a codec does not take, it refuses by saying what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shoal.codecs import Cast, Chain, Codec, Int4, Int8, OneBit, PowerSGD, RandomK, TopK
from shoal.errors import ConfigError
from tests.codecs.cases import CASES, KEY, Make, gradient

every_codec = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cast("fp8"), "a dtype among bf16, fp16, not 'fp8'"),
        (lambda: Int8(block=100), "power of two from 8 to 1048576"),
        (lambda: Int4(block=4), "power of two from 8 to 1048576"),
        (lambda: OneBit(block=2**21), "power of two from 8 to 1048576"),
        (lambda: TopK(0), "at least 1 entry: TopK"),
        (lambda: RandomK(-1), "at least 1 entry: RandomK"),
        (lambda: PowerSGD(rank=0), "rank must be at least 1"),
        (lambda: Chain(), "needs codecs, as in"),
        (lambda: Chain(Int8(), TopK(3)), "only the last codec can be Int8"),
        (lambda: Chain(TopK(3), PowerSGD(), Int8()), "only the last codec can be PowerSGD"),
        (lambda: Chain(TopK(3), PowerSGD()), "are no matrix, which PowerSGD"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(make: Callable[[], Codec], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@every_codec
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_other_numbers_are_refused(make: Make, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"not \w+: cast the model, or name the parameter in .*`uncompressed`"):
        make(100).check(dtype, 100)


@every_codec
def test_vectors_that_are_empty_or_too_long_are_refused(make: Make) -> None:
    for num_entries in (0, 2**31):
        with pytest.raises(ConfigError, match=f"takes 1 to 2147483647 entries, not {num_entries}"):
            make(1).check(torch.float32, num_entries)


@pytest.mark.parametrize("codec", [TopK(11), RandomK(11), Chain(TopK(11), Int8()), Chain(TopK(5), RandomK(6))], ids=str)
def test_more_entries_than_there_are_cannot_be_chosen(codec: Codec) -> None:
    with pytest.raises(ConfigError, match="choose a smaller k"):
        codec.check(torch.float32, 10)


@every_codec
def test_a_payload_of_another_length_is_refused(make: Make) -> None:
    codec, payload = make(100), make(100).encode(gradient(100), KEY)
    for wrong in (payload[:-8], torch.cat([payload, payload]), payload.view(torch.int8)):
        with pytest.raises(ConfigError, match="both sides must use the same codec"):
            codec.decode(wrong, KEY, torch.empty(100))
        with pytest.raises(ConfigError, match="both sides must use the same codec"):
            codec.encode(gradient(100), KEY, wrong)


@every_codec
def test_a_payload_that_lies_askew_is_refused(make: Make) -> None:
    askew = torch.empty(make(100).payload_bytes(100) + 4, dtype=torch.uint8)[4:]
    with pytest.raises(ConfigError, match="a multiple of 8 bytes, not at 4"):
        make(100).encode(gradient(100), KEY, askew)


@every_codec
def test_only_float32_is_decoded_to(make: Make) -> None:
    payload = make(100).encode(gradient(100), KEY)
    for wrong in (torch.empty(100, dtype=torch.float16), torch.empty(100, 2)[:, 0], torch.empty(10, 10)):
        with pytest.raises(ConfigError, match="needs a contiguous vector"):
            make(100).decode(payload, KEY, wrong)


@pytest.mark.parametrize(("num_entries", "k"), [(100, 3), (200_000, 1000)])
def test_indices_that_are_none_are_refused(num_entries: int, k: int) -> None:
    payload = TopK(k).encode(gradient(num_entries), KEY)
    for damage in (255, 127):
        payload[4 * k :] = damage
        with pytest.raises(ConfigError, match="the payload is damaged"):
            TopK(k).decode(payload, KEY, torch.empty(num_entries))
