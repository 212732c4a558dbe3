"""The compiled loops are the plain ones, bit for bit, and may run in many threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.codecs import Codec, Int8, TopK, device, keep_residual, plain
from tests.codecs.cases import COMPILED, KEY, SIZES, Make, decoded, gradient, same_bits

every_compiled_codec = pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED.keys())


class Plain:
    """The plain loops in the place of the compiled ones, which are handed arrays."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given: getattr(plain, name)(
            *(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in given)
        )


def both_ways(codec: Codec, vector: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """Payload, decoded, added and what is left: compiled, then plain."""
    results = []
    for _ in range(2):
        payload, added = codec.encode(vector, KEY), gradient(vector.numel(), seed=9)
        codec.decode(payload, KEY, added, add=True)
        left = torch.empty(vector.numel())
        keep_residual(codec, vector, payload, KEY, left)
        results.append([payload, decoded(codec, vector), added, left])
        monkeypatch.setattr(device, "compiled", Plain)
    monkeypatch.undo()
    return results[0], results[1]


@every_compiled_codec
@pytest.mark.parametrize("n", [*SIZES, 70_001])
@pytest.mark.parametrize("case", ["plain", "ties", "small", "bad"])
def test_a_compiled_loop_is_its_plain_twin(make: Make, n: int, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = gradient(n)
    if case == "ties":
        vector = (2 * vector).round()
    elif case == "small":
        vector *= torch.logspace(-44, -30, n)
    elif case == "bad":
        vector[n // 2], vector[n // 3] = torch.nan, torch.inf
    compiled, plain = both_ways(make(n), vector, monkeypatch)
    assert all(same_bits(one, other) for one, other in zip(compiled, plain, strict=True))


@every_compiled_codec
def test_many_threads_make_what_one_makes(make: Make) -> None:
    vectors = [gradient(20_000, seed=seed) for seed in range(8)]
    expected = [decoded(make(20_000), vector) for vector in vectors]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda vector: decoded(make(20_000), vector), vectors * 4))
    assert all(same_bits(one, other) for one, other in zip(found, expected * 4, strict=True))


def test_nothing_is_compiled_before_it_is_needed() -> None:
    script = (
        "import sys, shoal, shoal.codecs as codecs\n"
        "codecs.Chain(codecs.TopK(3), codecs.Int8()).payload_bytes(10)\n"
        "print('numba' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(COMPILED.keys() - {"power sgd"}))
def test_a_gpu_makes_the_payload_of_a_cpu(name: str) -> None:
    vector, codec = gradient(70_001), COMPILED[name](70_001)
    assert same_bits(codec.encode(vector.cuda(), KEY).cpu(), codec.encode(vector, KEY))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_of_matrices_are_on_a_gpu_what_they_are_on_a_cpu_to_rounding() -> None:
    vector, codec = gradient(70_001), COMPILED["power sgd"](70_001)
    torch.testing.assert_close(decoded(codec, vector.cuda()).cpu(), decoded(codec, vector), rtol=1e-4, atol=1e-4)


def test_both_kinds_of_indices_name_the_same_entries() -> None:
    vector = gradient(200_000)
    few, many = TopK(3), TopK(1000)
    assert few.index_bytes(200_000) == 12
    assert many.index_bytes(200_000) == 4 * 4 + 2000
    for codec in (few, many):
        kept = decoded(codec, vector).nonzero().view(-1)
        assert torch.equal(kept, vector.abs().topk(codec.k).indices.sort().values)


def test_int8_costs_less_than_two_percent_over_a_byte_an_entry() -> None:
    assert Int8().payload_bytes(2_000_000) < 1.02 * 2_000_000
