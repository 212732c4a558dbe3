"""One worker of a data-parallel loop on a host of a lab: torch's DDP with or without a hook, or Shoal's exchange.

A host has one process for all variants, each with connections of its own. It does as it is told, so that they can be
measured in turns: a few steps of the one, a few of the other, and again. All train the same model on the same batches;
Shoal's does what a run does in a step, roll call included.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import site
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import REPOSITORY
from shoal import AllReduce, Cast, Int4, Int8, OneBit, PowerSGD, RandomK, TopK
from shoal.codecs import warm_up
from shoal.comm.collectives import Group, Seat
from shoal.comm.meeting import Meeting
from shoal.lab import Lab
from shoal.strategies import Share

WIDTH = 1024
SAMPLES = 16
"""A worker's batch."""
END_S = 10.0
TIMEOUT_S = 60.0
ANSWER_S = 25.0

OURS: dict[str, Any] = {
    "fp32": None,
    "bf16": Cast("bf16"),
    "int8": Int8(),
    "int4": Int4(),
    "onebit": OneBit(),
    "topk_1%": TopK(18_000),
    "randomk_1%": RandomK(18_000),
    "powersgd_4": PowerSGD(4),
}
TORCHS = ("ddp", "ddp_fp16")
UNSAFE = ("ddp_bf16", "ddp_powersgd", "ddp_int8")
"""Hooks of torch's that fail or hang here; each is tried in processes of its own."""


def build() -> nn.Module:
    """An MLP of 1.86 million parameters, the same everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )  # fmt: skip


def num_parameters() -> int:
    return sum(p.numel() for p in build().parameters())


class FolderMeeting(Meeting):
    """Members meet over files of a folder: the hosts of a lab share one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(1, lambda key, value: self._write(folder, key, value), TIMEOUT_S)
        self._folder = folder
        self.has_met = False
        """Set once the group is formed: who watches on takes the time of who is measured."""
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def _write(folder: Path, key: str, value: bytes) -> None:
        path = folder / key.replace("/", "%")
        path.with_suffix(f".{os.getpid()}").write_bytes(value)
        path.with_suffix(f".{os.getpid()}").rename(path)

    def _watch(self) -> None:
        while not self.has_met:
            for path in self._folder.iterdir():
                if not path.suffix:
                    self.deliver(path.name.replace("%", "/"), path.read_bytes())
            time.sleep(0.01)


class Ours:
    """Shoal's exchange in a plain loop."""

    def __init__(self, name: str, seat: Seat, folder: Path) -> None:
        codec = OURS[name]
        if codec is not None:
            warm_up(codec)
        meeting = FolderMeeting(folder)
        self._group = Group.form(seat, meeting)
        meeting.has_met = True
        self._model = build()
        self._reducer = AllReduce(codec=codec, bucket_bytes=1 << 20).bind(self._model)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9, fused=True)
        self._share = Share(1 / seat.world_size, leads=seat.rank == 0)
        self._step = 0

    def step(self, images: Tensor, labels: Tensor) -> None:
        """A whole step."""
        self._reducer.begin(self._group, self._step)
        loss = nn.functional.cross_entropy(self._model(images), labels) / self._group.seat.world_size
        call = self._group.all_reduce(torch.zeros(20, dtype=torch.float64))
        self._reducer.arm()
        loss.backward()  # type: ignore[no-untyped-call]
        self._end()
        call.wait()

    def exchange(self) -> None:
        """The exchange of a step's gradients, all of which are there."""
        self._reducer.begin(self._group, self._step)
        self._end()

    def _end(self) -> None:
        self._reducer.launch(self._share)
        agreed = self._reducer.finish()
        self._reducer.remember(self._step + 1)
        self._reducer.apply(agreed, self._optimizer.step)
        self._step += 1


class Torchs:
    """DistributedDataParallel, with one of torch's hooks if named."""

    def __init__(self, name: str, seat: Seat, folder: Path) -> None:
        if not dist.is_initialized():
            os.environ["GLOO_SOCKET_IFNAME"] = interface()
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=seat.rank, world_size=seat.world_size,
                timeout=timedelta(seconds=TIMEOUT_S),
            )  # fmt: skip
        group = dist.new_group()
        self._model = DistributedDataParallel(
            build(), process_group=group, gradient_as_bucket_view=True, static_graph=True
        )
        match name:
            case "ddp_fp16":
                self._model.register_comm_hook(group, default_hooks.fp16_compress_hook)
            case "ddp_bf16":
                self._model.register_comm_hook(group, default_hooks.bf16_compress_hook)
            case "ddp_powersgd":
                state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=4, start_powerSGD_iter=2)
                self._model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
            case "ddp_int8":
                self._model.register_comm_hook(group, quantization_hooks.quantization_pertensor_hook)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """A whole step."""
        self._optimizer.zero_grad()
        nn.functional.cross_entropy(self._model(images), labels).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def exchange(self) -> None:
        """DDP exchanges nothing but in a step."""
        raise NotImplementedError("a step is what can be measured of DDP")


def interface() -> str:
    """This host's one interface."""
    return next(name for name in os.listdir("/sys/class/net") if name != "lo")


class Loops:
    """Some variants on all hosts of a lab."""

    def __init__(self, lab: Lab, names: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self.names = tuple(names)
        self._log = (folder / "log").open("w")
        self._lab = lab
        count = str(len(lab.hosts))
        self._workers: list[subprocess.Popen[str]] = [
            host.popen(
                [sys.executable, "-m", "benchmarks.loops", str(host.number), count, host.address, str(folder), *names],
                env=environment, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
                text=True,
            )
            for host in lab.hosts
        ]  # fmt: skip

    def __enter__(self) -> Loops:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, name: str, what: str, num_times: int) -> list[float]:
        """Seconds that each of so many steps (``step``) or exchanges (``exchange``) took on the slowest host.

        ``RuntimeError`` if a worker has ended or does not answer in time.
        """
        for worker in self._workers:
            assert worker.stdin is not None
            try:
                worker.stdin.write(f"{name} {what} {num_times}\n")
                worker.stdin.flush()
            except BrokenPipeError:
                raise self._ended(name) from None
        answers = [self._answer(name, worker) for worker in self._workers]
        return [max(times) for times in zip(*answers, strict=True)]

    def _answer(self, name: str, worker: subprocess.Popen[str]) -> Sequence[float]:
        assert worker.stdout is not None
        ready, _, _ = select.select([worker.stdout], [], [], ANSWER_S)
        line = worker.stdout.readline() if ready else ""
        if not line:
            raise self._ended(name) if ready else RuntimeError(f"{name} hangs: no answer within {ANSWER_S:g} s")
        return list(json.loads(line))

    def _ended(self, name: str) -> RuntimeError:
        text = Path(self._log.name).read_text().strip()
        for place in (site.getsitepackages()[0], str(REPOSITORY)):  # results are for others to read
            text = text.replace(f"{place}/", "")
        said = text.splitlines()
        return RuntimeError(f"{name} has ended: {said[-1] if said else 'without a word'}")

    def sent_bytes(self, name: str, what: str, num_times: int) -> float:
        """Bytes that a host's interface sent for each, by the kernel's counter: the mean over the hosts."""
        before = [self._lab.bytes(host)[0] for host in self._lab.hosts]
        self.run(name, what, num_times)
        sent = [self._lab.bytes(host)[0] - b for host, b in zip(self._lab.hosts, before, strict=True)]
        return sum(sent) / len(sent) / num_times

    def close(self) -> None:
        for worker in self._workers:
            assert worker.stdin is not None
            with suppress(BrokenPipeError):
                worker.stdin.close()
        for worker in self._workers:
            try:
                worker.wait(END_S)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
        self._log.close()


def batches(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batch again and again: it is time that is measured."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.rand(SAMPLES, 784, generator=generator)
    labels = torch.randint(10, (SAMPLES,), generator=generator)
    while True:
        yield images, labels


def timed(act: Callable[[], None]) -> float:
    """Seconds that it took."""
    begun_s = time.perf_counter()
    act()
    return time.perf_counter() - begun_s


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description="One worker; see Loops.")
    for name, kind in (("rank", int), ("world_size", int), ("address", str), ("folder", Path)):
        parser.add_argument(name, type=kind)
    parser.add_argument("variants", nargs="+")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    seat = Seat(1, chosen.rank, chosen.world_size, host=chosen.address, timeout_s=TIMEOUT_S)
    loops: dict[str, Ours | Torchs] = {}
    for name in chosen.variants:
        place = chosen.folder / name
        place.mkdir(exist_ok=True)
        loops[name] = (Ours if name in OURS else Torchs)(name, seat, place)
    data = batches(chosen.rank)
    for line in sys.stdin:
        name, what, count = line.split()
        loop = loops[name]
        act = loop.exchange if what == "exchange" else lambda loop=loop: loop.step(*next(data))
        print(json.dumps([timed(act) for _ in range(int(count))]), flush=True)
    sys.stdout.flush()
    os._exit(0)  # its connections end with it


if __name__ == "__main__":
    main()
