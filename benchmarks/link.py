"""What a step's communication takes over the least that the link's rate allows, and a step over torch's.

python -m benchmarks.link [--quick]

Four hosts of a lab, one thread each; an MLP of 1.86 million parameters, 16 samples a worker. The limit is that of bytes
alone: each host must send and receive 2 (n - 1) / n times the payload of all gradients, at the nominal rate, without
headers. Variants take turns; a figure is the median of its turns' medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.loops import OURS, SAMPLES, TORCHS, UNSAFE, Loops, num_parameters
from benchmarks.machine import REPOSITORY, finish, median_and_spread
from shoal.lab import Lab, LabSpec

HOSTS = 4
RATES = {"100mbit": 100e6, "1gbit": 1e9}
WARM_UP_STEPS = 2
QUICK = ("ddp", "ddp_fp16", "fp32", "int8", "onebit")


@dataclass
class Measured:
    """What was seen of a variant at one rate: seconds a turn, by what was done, and bytes a host a step."""

    step_s: list[float] = field(default_factory=list)
    exchange_s: list[float] = field(default_factory=list)
    sent_bytes: float = 0.0

    @property
    def median_step_s(self) -> float:
        return statistics.median(self.step_s)


def least_bytes(name: str) -> float | None:
    """What each host must send of a variant's payloads, however clever the exchange; None for torch's."""
    if name not in OURS:
        return None
    codec, n = OURS[name], num_parameters()
    payload = 4 * n if codec is None else codec.payload_bytes(n)
    if name.startswith("powersgd"):
        return None  # its size depends on the shapes
    return 2 * (HOSTS - 1) / HOSTS * payload


def measure(lab: Lab, names: tuple[str, ...], folder: Path, turns: int, steps: int) -> dict[str, Measured]:
    """The variants in turns."""
    found = {name: Measured() for name in names}
    with Loops(lab, names, folder) as loops:
        for name in names:
            loops.run(name, "step", WARM_UP_STEPS)
        for turn in range(turns):
            for name in names if turn % 2 == 0 else reversed(names):
                found[name].step_s.append(statistics.median(loops.run(name, "step", steps)))
                if name in OURS:
                    found[name].exchange_s.append(statistics.median(loops.run(name, "exchange", steps)))
            print(f"turn {turn + 1} of {turns} is done", flush=True)
        for name in names:
            found[name].sent_bytes = loops.sent_bytes(name, "step", 1 if steps == 2 else steps)
    return found


def try_alone(lab: Lab, name: str, folder: Path, steps: int) -> Measured | str:
    """A hook that may fail or hang, in processes of its own: what was seen of it, or how it failed."""
    try:
        return measure(lab, (name,), folder, 1, steps)[name]
    except RuntimeError as error:
        for host in lab.hosts:
            lab.kill(host)
        return str(error).replace(f"{REPOSITORY}/", "")


def row(name: str, seen: Measured, rate: float, ddp: Measured) -> dict[str, Any]:
    """A variant's figures at one rate."""
    least = least_bytes(name)
    limit_s = None if least is None else 8 * least / rate
    exchange_s = statistics.median(seen.exchange_s) if seen.exchange_s else None
    return {
        "step_s": median_and_spread(seen.step_s),
        "vs_ddp": round(ddp.median_step_s / seen.median_step_s, 2),
        "exchange_s": exchange_s,
        "limit_s": limit_s,
        "over_limit": round(exchange_s / limit_s, 3) if exchange_s and limit_s else None,
        "sent_bytes": round(seen.sent_bytes),
        "computed_bytes": None if least is None else round(least),
    }


def show(rate: str, rows: dict[str, dict[str, Any]], failed: dict[str, str]) -> None:
    """A table for people."""
    print(f"\nat {rate}: {HOSTS} hosts, {num_parameters():,} parameters, {SAMPLES} samples a worker")
    print(f"{'':14} {'step':>9} {'vs DDP':>7} {'exchange':>9} {'limit':>9} {'over':>6} {'sent':>10} {'computed':>10}")
    for name, r in rows.items():
        cells = [f"{r['step_s']['median'] * 1e3:6.1f} ms", f"{r['vs_ddp']:.2f}"]
        cells += [f"{r[key] * 1e3:6.1f} ms" if r[key] else "" for key in ("exchange_s", "limit_s")]
        cells += [f"{r['over_limit']:.3f}" if r["over_limit"] else "", f"{r['sent_bytes'] / 1e6:.3f} MB"]
        cells += [f"{r['computed_bytes'] / 1e6:.3f} MB" if r["computed_bytes"] else ""]
        widths = (9, 7, 9, 9, 6, 10, 10)
        print(f"{name:14} " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    for name, why in failed.items():
        print(f"{name:14} did not run: {why}")


def at_rate(rate: str, *, quick: bool) -> tuple[dict[str, dict[str, Any]], dict[str, str], float]:
    """The table at one rate, what did not run, and the payload rate that one connection reached (bit/s)."""
    names = QUICK if quick else (*TORCHS, *OURS)
    turns, steps = (2, 2) if quick else (3, 4 if rate == "100mbit" else 10)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, Lab(LabSpec(hosts=HOSTS, link=rate, warm=True)) as lab:
        reached = lab.measure(0, 1)
        print(f"a connection carries {reached / 1e6:.1f} Mbit/s of payload over a link of {rate}", flush=True)
        seen = measure(lab, names, Path(folder) / "all", turns, steps)
        for name in () if quick or rate != "100mbit" else UNSAFE:
            result = try_alone(lab, name, Path(folder) / name, steps)
            if isinstance(result, Measured):
                seen[name] = result
            else:
                failed[name] = result
    rows = {name: row(name, one, RATES[rate], seen["ddp"]) for name, one in seen.items()}
    show(rate, rows, failed)
    return rows, failed, reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100 Mbit/s only, and fewer variants")
    options = parser.parse_args()
    rates = ("100mbit",) if options.quick else tuple(RATES)
    tables = {rate: at_rate(rate, quick=options.quick) for rate in rates}
    rows, failed, _ = tables["100mbit"]
    hooks = {name: r["step_s"]["median"] for name, r in rows.items() if name.startswith("ddp_")}
    best = min(hooks, key=lambda name: hooks[name])
    figures = {
        "fp32_over_limit": rows["fp32"]["over_limit"],
        "int8_over_limit": rows["int8"]["over_limit"],
        "int8_vs_ddp": rows["int8"]["vs_ddp"],
        "onebit_vs_ddp": rows["onebit"]["vs_ddp"],
        "best_hook": best,
        "int8_vs_best_hook": round(hooks[best] / rows["int8"]["step_s"]["median"], 2),
        "onebit_vs_best_hook": round(hooks[best] / rows["onebit"]["step_s"]["median"], 2),
        "hooks_that_failed": sorted(failed),
        "int8_vs_ddp_1gbit": tables["1gbit"][0]["int8"]["vs_ddp"] if "1gbit" in tables else None,
    }
    config = {
        "quick": options.quick, "hosts": HOSTS, "samples_a_worker": SAMPLES, "parameters": num_parameters(),
        "tables": {rate: rows for rate, (rows, _, _) in tables.items()}, "failed": failed,
        "payload_bit_per_s": {rate: reached for rate, (_, _, reached) in tables.items()},
        "tcp_congestion_in_the_lab": "cubic",
    }  # fmt: skip
    finish("link", figures, config)


if __name__ == "__main__":
    main()
