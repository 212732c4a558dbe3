"""torchft's DiLoCo as a peer of time to accuracy: its workers in torchft's own environment, on the lab's hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy_job
from benchmarks.accuracy_runs import HOSTS, Benches
from benchmarks.accuracy_traces import Trace
from benchmarks.machine import REPOSITORY
from benchmarks.peers.envs import python_of

PORT = 29510
SETTING = "diloco_16_int4"
"""The setting of ours that it is given too, but for the codec: torchft's needs a GPU."""


def run(benches: Benches, steps: int = accuracy_job.STEPS) -> Trace:
    """Train with it. ``RuntimeError``, with what it said last, where it fails."""
    python = python_of("torchft")
    with _lighthouse(benches, python):
        return benches.peer("torchft_diloco", lambda rank, _, folder: _worker(benches, python, folder, rank, steps))


@contextmanager
def _lighthouse(benches: Benches, python: Path) -> Iterator[None]:
    host = benches.shaped.hosts[0]
    command = [
        str(python.parent / "torchft_lighthouse"), f"--bind={host.address}:{PORT}", f"--min_replicas={HOSTS}",
        "--join_timeout_ms=10000", "--quorum_tick_ms=10",
    ]  # fmt: skip
    with (benches.folder / "lighthouse").open("w") as log:
        process = host.popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _worker(benches: Benches, python: Path, folder: Path, rank: int, steps: int) -> list[str]:
    """The command of a rank; the first also writes the data."""
    if rank == 0:
        for name in ("train", "test"):
            for part, array in zip(("images", "labels"), accuracy_job.arrays(name), strict=True):
                np.save(folder / f"{name}-{part}.npy", array)
    host = benches.shaped.hosts[rank]
    setting = accuracy_job.SETTINGS[SETTING]
    options: dict[str, Any] = {
        "seed": 0, "steps": steps, "warm_up": accuracy_job.WARM_UP, "global_batch": accuracy_job.GLOBAL_BATCH,
        "learning_rate": setting.learning_rate, "outer_momentum": setting.strategy.outer.momentum,
        "sync_every": setting.strategy.sync_every_steps, "evaluate_every": accuracy_job.EVALUATE_EVERY_STEPS,
    }  # fmt: skip
    lighthouse = f"http://{benches.shaped.hosts[0].address}:{PORT}"
    return [
        "env", f"TORCHFT_LIGHTHOUSE={lighthouse}", f"GLOO_SOCKET_IFNAME={_interface(benches, rank)}", "RUST_LOG=warn",
        str(python), "-m", "benchmarks.peers.with_torchft_diloco", str(rank), str(HOSTS), host.address, str(folder),
        json.dumps(options),
    ]  # fmt: skip


def _interface(benches: Benches, rank: int) -> str:
    """The name of a host's one interface."""
    shown = benches.shaped.hosts[rank].run(["ls", "/sys/class/net"], capture_output=True, text=True, cwd=REPOSITORY)
    return next(name for name in str(shown.stdout).split() if name != "lo")
