"""What each codec saves on the wire, costs on a processor, and loses.

python -m benchmarks.codecs [--quick]

One thread. Rates are float32 bytes of the vector over the thread's processor time, so that what else the machine does
counts little: the median of many calls, in turns with those of the other codecs. Errors are L2 norms of what one
payload loses, relative to the vector's, without feedback from earlier steps: of Gaussian entries, and of heavy-tailed
ones (a Gaussian times a log-normal).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import finish, median_and_spread
from shoal.codecs import Cast, Chain, Codec, Int4, Int8, OneBit, PowerSGD, RandomK, TopK, warm_up

SEED = 0
SIZES = (2_000_000, 100_000)


def codecs_for(num_entries: int) -> dict[str, Codec]:
    """Those that are compared, for a vector of so many entries."""
    one_percent = num_entries // 100
    return {
        "bf16": Cast("bf16"),
        "fp16": Cast("fp16"),
        "int8": Int8(),
        "int8_stochastic": Int8(stochastic=True),
        "int4": Int4(),
        "int4_stochastic": Int4(stochastic=True),
        "one_bit": OneBit(),
        "top_1_percent": TopK(one_percent),
        "random_1_percent": RandomK(one_percent),
        "top_1_percent_int8": Chain(TopK(one_percent), Int8()),
        "power_sgd_rank_2": PowerSGD(rank=2),
    }


@dataclass
class Trial:
    """A codec at one size, and how long its calls took."""

    name: str
    codec: Codec
    vector: Tensor
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.payload = self.codec.encode(self.vector, SEED)
        self.out = torch.empty_like(self.vector)

    def run(self, key: int) -> None:
        """One call each way."""
        start_s = time.thread_time()
        self.codec.encode(self.vector, key, self.payload)
        between_s = time.thread_time()
        self.codec.decode(self.payload, key, self.out)
        self.decode_s.append(time.thread_time() - between_s)
        self.encode_s.append(between_s - start_s)

    @property
    def raw_bytes(self) -> int:
        return 4 * self.vector.numel()

    @property
    def compression_factor(self) -> float:
        return self.raw_bytes / self.payload.numel()

    def gb_per_s(self, seconds: list[float]) -> float:
        return self.raw_bytes / statistics.median(seconds) / 1e9

    def both_s(self) -> list[float]:
        return [encode_s + decode_s for encode_s, decode_s in zip(self.encode_s, self.decode_s, strict=True)]


def gaussian(num_entries: int) -> Tensor:
    return torch.randn(num_entries, generator=torch.Generator().manual_seed(SEED))


def heavy_tailed(num_entries: int) -> Tensor:
    rng = torch.Generator().manual_seed(SEED)
    return torch.randn(num_entries, generator=rng) * torch.randn(num_entries, generator=rng).exp()


def relative_error(codec: Codec, vector: Tensor) -> float:
    """The norm of what is lost over the vector's."""
    out = torch.empty_like(vector)
    codec.decode(codec.encode(vector, SEED), SEED, out)
    return float((vector - out).norm() / vector.norm())


def measure(num_entries: int, num_calls: int) -> list[Trial]:
    """All codecs in turns."""
    vector = gaussian(num_entries)
    trials = [Trial(name, codec, vector) for name, codec in codecs_for(num_entries).items()]
    for key in range(num_calls):
        for trial in trials:
            trial.run(key)
    return trials


def show(trials: list[Trial], errors: dict[str, list[float]]) -> None:
    num_entries = trials[0].vector.numel()
    table = Table(title=f"{num_entries:,} entries, one thread")
    for column in ("codec", "times less", "encode GB/s", "decode GB/s", "both GB/s", "error", "heavy-tailed"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for trial in trials:
        rates = [trial.gb_per_s(seconds) for seconds in (trial.encode_s, trial.decode_s, trial.both_s())]
        lost = [f"{error:.4f}" for error in errors[trial.name]]
        table.add_row(trial.name, f"{trial.compression_factor:.2f}", *(f"{rate:.2f}" for rate in rates), *lost)
    Console(width=100).print(table)


def figures_of(trials: list[Trial], errors: dict[str, list[float]]) -> dict[str, float]:
    """The figures at the first size, by the codecs' names."""
    figures: dict[str, float] = {}
    for trial in trials:
        figures |= {
            f"{trial.name}_compression_factor": round(trial.compression_factor, 2),
            f"{trial.name}_gb_per_s": round(trial.gb_per_s(trial.both_s()), 3),
            f"{trial.name}_error": round(errors[trial.name][0], 4),
            f"{trial.name}_heavy_tailed_error": round(errors[trial.name][1], 4),
        }
    return figures


def spread_of(trial: Trial) -> dict[str, dict[str, float]]:
    """Over the calls."""
    rates = {"encode": trial.encode_s, "decode": trial.decode_s}
    return {
        f"{way}_gb_per_s": median_and_spread([trial.raw_bytes / s / 1e9 for s in seconds])
        for way, seconds in rates.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    num_calls = 5 if options.quick else 41
    torch.set_num_threads(1)
    for codec in codecs_for(SIZES[0]).values():
        warm_up(codec)
    figures: dict[str, float] = {}
    spread = {}
    for num_entries in SIZES:
        trials = measure(num_entries, num_calls)
        vectors = gaussian(num_entries), heavy_tailed(num_entries)
        errors = {trial.name: [relative_error(trial.codec, vector) for vector in vectors] for trial in trials}
        show(trials, errors)
        figures = figures or figures_of(trials, errors)
        spread[str(num_entries)] = {trial.name: spread_of(trial) for trial in trials}
    finish("codecs", figures, {"quick": options.quick, "calls": num_calls, "sizes": SIZES, "spread": spread}, SEED)


if __name__ == "__main__":
    main()
