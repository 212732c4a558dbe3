"""One worker of torch's DistributedDataParallel on the task of ``benchmarks.accuracy_job``.

It takes the samples that a run of Shoal's takes in a step, from the same initial parameters, and evaluates at the same
steps. Rank 0 writes what happened to ``FOLDER/events.jsonl`` in the form of a run's events, so that both are read
alike. With a world size of 1 it is the plain PyTorch loop: the same optimisation without an exchange.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from benchmarks import accuracy_job
from benchmarks.loops import interface
from shoal.evaluation import measure, merged
from shoal.events import EventLog
from shoal.lanes import Order, Steps
from shoal.sources import LocalBatch, Prefetch

NUM_LANES = accuracy_job.job.num_lanes
TIMEOUT_S = 60.0


class Share:
    """A rank's part of the samples, step by step, and of the test data."""

    def __init__(self, rank: int, world_size: int, seed: int) -> None:
        job = accuracy_job.job
        sizes = job.train.block_sizes()
        self.lanes = tuple(range(rank, NUM_LANES, world_size))
        order = lru_cache(maxsize=2)(lambda epoch: Order(sizes, NUM_LANES, seed, epoch))
        steps = Steps(sum(sizes), job.global_batch, NUM_LANES, epochs=None, total_steps=accuracy_job.STEPS)
        self.batches = Prefetch(job.train.open(), order, steps, self.lanes, first_step=0)
        self._steps = steps
        assert job.test is not None
        self._test = job.test.open()

    def fraction(self, local: LocalBatch) -> float:
        """This rank's part of the step's samples."""
        span = self._steps.span(local.step)
        return local.num_samples / float((span.stops - span.starts).sum())

    def evaluate(self, model: nn.Module, world_size: int) -> dict[str, Any]:
        """The figures over all ranks' lanes."""
        payload = measure(accuracy_job.job, model, self._test, self.lanes)
        payloads: list[Any] = [payload]
        if world_size > 1:
            payloads = _all_gather(payload, world_size)
        return merged(payloads)


def _all_gather(payload: bytes, world_size: int) -> list[bytes]:
    """Everybody's bytes, as tensors: nothing is unpickled."""
    own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(own)]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = own
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return [bytes(part[: int(size)].tolist()) for part, size in zip(parts, sizes, strict=True)]


class Log:
    """What rank 0 writes down."""

    def __init__(self, folder: Path, *, leads: bool) -> None:
        self._log = EventLog(folder / "events.jsonl") if leads else None

    def note(self, kind: str, **fields: Any) -> None:
        """An event, now."""
        if self._log is not None:
            self._log.append({"at_s": time.time(), "kind": kind, **fields})


def wrapped(model: nn.Module, hook: str) -> nn.Module:
    """The model in DDP at its best settings, with a hook of torch's if one is named."""
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    if hook == "fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook != "none":
        raise SystemExit(f"the hook is none or fp16, not {hook}")
    return ddp


def train(rank: int, world_size: int, folder: Path, options: Mapping[str, Any]) -> None:
    """To the end of the schedule, or the first evaluation that reaches ``options["until"]``."""
    torch.manual_seed(options["seed"])
    plain = accuracy_job.Clothes().model()
    share, log = Share(rank, world_size, options["seed"]), Log(folder, leads=rank == 0)
    optimizer = accuracy_job.SETTINGS["allreduce_fp32"].optimizer(plain.parameters())
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )  # fmt: skip
    model = wrapped(plain, options["hook"]) if world_size > 1 else plain
    log.note("generation")
    losses: list[Tensor] = []
    for local in share.batches:
        losses.append(_step(model, optimizer, local, share.fraction(local) * world_size))
        done = local.step + 1
        if done % accuracy_job.EVALUATE_EVERY_STEPS == 0:
            log.note("progress", step=done, loss=float(torch.stack(losses).mean()))
            losses.clear()
            if done < options["evaluate_from"]:
                continue
            figures = share.evaluate(plain, world_size)
            log.note("evaluated", step=done, figures=figures)
            if figures["accuracy"] >= options["until"]:
                break
    share.batches.close()
    log.note("ended")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, local: LocalBatch, weight: float) -> Tensor:
    """One step; this rank's loss. ``weight`` makes DDP's mean over ranks one over samples."""
    rate = accuracy_job.LEARNING_RATE * accuracy_job.warm_up_then_fall(local.step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss = accuracy_job.Clothes().loss(model, local.batches[0])
    (loss * weight).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy_ddp", description=__doc__)
    for name, kind in (("rank", int), ("world_size", int), ("folder", Path)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--hook", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=1.0)
    parser.add_argument("--evaluate-from", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.world_size > 1:
        with suppress(StopIteration):
            os.environ["GLOO_SOCKET_IFNAME"] = interface()
    train(chosen.rank, chosen.world_size, chosen.folder, vars(chosen))
    os._exit(0)  # its connections end with it


if __name__ == "__main__":
    main()
