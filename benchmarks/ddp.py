"""Plain PyTorch to compare with: its own loop, and DistributedDataParallel at its best settings over gloo.

Workers live for as long as the comparison and run as many steps as they are told, so that a noisy machine can be shared
fairly: a segment of the one, a segment of the other, and again.

    with Baseline("benchmarks.overhead:recipe", num_workers=2) as ddp, Baseline("…", num_workers=1) as plain:
        ddp.run(20)
        plain.run(20)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import REPOSITORY, peak_rss_bytes

END_LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained. A function without arguments returns it, named as ``package.module:function``."""

    model: Callable[[], nn.Module]
    """Build the model, with the same parameters in every process."""
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    loss: Callable[[nn.Module, Any], Tensor]
    """The mean loss of one batch, a scalar."""
    batches: Callable[[int, int], Iterator[Any]]
    """From (rank, world_size) to that rank's batches, without end."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Some steps of a baseline."""

    step_s: list[float]
    """Each step's time on its slowest worker, its batch's fetch included."""
    peak_rss_bytes: list[int]
    """The most memory that each worker has ever held (VmHWM), by rank."""


class Baseline:
    """One worker is the plain loop, without torch.distributed; more are DistributedDataParallel. A context."""

    def __init__(self, recipe: str, *, num_workers: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="baseline-")
        store = Path(self._folder.name) / "store"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.ddp", recipe, str(rank), str(num_workers), str(store)],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_workers)
        ]

    def __enter__(self) -> Baseline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The workers' processes, by rank."""
        return [worker.pid for worker in self._workers]

    def run(self, num_steps: int) -> Segment:
        """Make that many steps. The first call also starts the model up: leave its times out.

        Raises RuntimeError if a worker has ended; what it said is on stderr.
        """
        for worker in self._workers:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(f"{num_steps}\n")
                worker.stdin.flush()
        answers = [self._answer(rank) for rank in range(len(self._workers))]
        return Segment(
            step_s=[max(times) for times in zip(*(answer["step_s"] for answer in answers), strict=True)],
            peak_rss_bytes=[answer["peak_rss_bytes"] for answer in answers],
        )

    def close(self) -> None:
        """End the workers: a closed pipe tells them to; who does not heed it is killed."""
        for worker in self._workers:
            if worker.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    worker.stdin.close()
        for worker in self._workers:
            try:
                worker.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
        self._folder.cleanup()

    def _answer(self, rank: int) -> dict[str, Any]:
        stdout = self._workers[rank].stdout
        line = stdout.readline() if stdout is not None else ""
        if not line:
            raise RuntimeError(f"an answer from baseline worker {rank} was needed, but it has ended; see stderr above")
        return cast(dict[str, Any], json.loads(line))


def _work(recipe: Recipe, rank: int, world_size: int, store: str) -> None:
    """One worker: a line of stdin is a number of steps; a line of stdout is what they took."""
    torch.set_num_threads(1)
    model = recipe.model()
    optimizer = recipe.optimizer(model.parameters())
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    batches = recipe.batches(rank, world_size)
    for line in sys.stdin:
        step_s = [_step(recipe, model, optimizer, batches) for _ in range(int(line))]
        print(json.dumps({"step_s": step_s, "peak_rss_bytes": peak_rss_bytes()}), flush=True)
    if world_size > 1:
        dist.destroy_process_group()


def _step(recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Any]) -> float:
    begun = time.perf_counter()
    batch = next(batches)
    optimizer.zero_grad()
    recipe.loss(model, batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ddp", description="One worker; see Baseline.")
    parser.add_argument("recipe")
    parser.add_argument("rank", type=int)
    parser.add_argument("world_size", type=int)
    parser.add_argument("store")
    chosen = parser.parse_args()
    module, _, function = chosen.recipe.partition(":")
    recipe = getattr(importlib.import_module(module), function)()
    _work(recipe, chosen.rank, chosen.world_size, chosen.store)


if __name__ == "__main__":
    main()
