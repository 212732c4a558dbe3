"""What Shoal costs when nothing goes wrong, over plain PyTorch, in time and memory.

python -m benchmarks.overhead [--quick]

A transformer of 2.2 million parameters on token sequences in memory. Two workers against DistributedDataParallel, one
against the plain loop, one torch thread each, in turns: while one computes, the other is stopped (SIGSTOP).
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shoal
from benchmarks.ddp import Baseline, Recipe
from benchmarks.machine import finish, median_and_spread, peak_rss_bytes
from shoal.comm import messages as msg
from shoal.events import Event, read_events
from shoal.launch.run import runs_folder
from shoal.metrics import Metric
from shoal.training.commanding import command
from shoal.training.folder import RunFolder

VOCABULARY, LENGTH, WIDTH, LAYERS, HEADS = 1000, 64, 192, 4, 4
NUM_SEQUENCES, BATCH_A_WORKER = 4096, 8
WARM_UP_STEPS = 6
EVENT_EVERY_STEPS = 4
POLL_S = 0.2


class Tokens(nn.Module):
    """A causal transformer that predicts the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH - 1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens), mask=self.mask, is_causal=True))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean cross entropy of each next token of (n, LENGTH) int64."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def sequences() -> np.ndarray:
    """(NUM_SEQUENCES, LENGTH) int64, the same everywhere."""
    return np.random.default_rng(0).integers(VOCABULARY, size=(NUM_SEQUENCES, LENGTH))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Tokens()


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def recipe() -> Recipe:
    """The same for the baselines: rows by index from memory, without a loader's cost."""
    tokens = torch.from_numpy(sequences())

    def batches(rank: int, world_size: int) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(NUM_SEQUENCES, generator=torch.Generator().manual_seed(0))
            for start in range(0, NUM_SEQUENCES, BATCH_A_WORKER * world_size):
                yield tokens[order[start + rank * BATCH_A_WORKER :][:BATCH_A_WORKER]]

    return Recipe(model=build, optimizer=sgd, loss=loss_of, batches=batches)


class NextToken:
    """The same as a task."""

    def model(self) -> nn.Module:
        return build()

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return loss_of(model, batch[0])

    def metrics(self, model: nn.Module, batch: tuple[Tensor]) -> dict[str, Metric]:
        return {}


def job_of(workers: int) -> shoal.Job:
    """The same as a job, without end."""
    return shoal.Job(
        task=NextToken(),
        train=shoal.Arrays(sequences()),
        optimizer=sgd,
        global_batch=BATCH_A_WORKER * workers,
        steps=1_000_000,
        num_threads=1,
        log_every_steps=EVENT_EVERY_STEPS,
        patience=shoal.Patience(silent_s=1e6, disconnected_s=1e6, collective_s=1e6, stuck_s=1e6),
    )


class Ours:
    """A run that computes only while it is let."""

    def __init__(self, workers: int, folder: Path) -> None:
        os.environ["SHOAL_RUNS"] = str(folder)
        name = f"overhead-{workers}"
        self._folder = RunFolder((runs_folder() / name).resolve())
        options = shoal.TrainOptions(quiet=True)
        self._offset = 0
        self._thread = threading.Thread(
            target=shoal.train, args=(job_of(workers),), kwargs={"workers": workers, "name": name, "options": options}
        )
        self._thread.start()
        self.segment(WARM_UP_STEPS)

    def _new_events(self, kind: str) -> list[Event]:
        """Those since the last look. Looking is cheap and rare: the processors are the workers'."""
        events, self._offset = read_events(self._folder.events_path, self._offset)
        return [event for event in events if event["kind"] == kind]

    @property
    def pids(self) -> list[int]:
        events, _ = read_events(self._folder.events_path)
        return [event["pid"] for event in events if event["kind"] == "joined"]

    def _signal(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def segment(self, num_steps: int) -> float:
        """Seconds a step over at least this many steps, from event to event."""
        self._new_events("progress")
        self._signal(signal.SIGCONT)
        events: list[Event] = []
        while len(events) < 2 + num_steps / EVENT_EVERY_STEPS:
            time.sleep(POLL_S)
            events += self._new_events("progress")
        self._signal(signal.SIGSTOP)
        events = events[1:]  # the first may have begun before
        return (events[-1]["at_s"] - events[0]["at_s"]) / (events[-1]["step"] - events[0]["step"])

    def peak_bytes(self) -> int:
        return max(peak_rss_bytes(pid) for pid in self.pids)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        command(self._folder, msg.Stop(reason="the benchmark is over"))
        self._thread.join()


def turns(ours: Callable[[int], float], theirs: Callable[[int], float], pairs: int, steps: int) -> list[float]:
    """The ratios of seconds a step, ours over theirs, pair by pair, who goes first alternating."""
    ratios = []
    for pair in range(pairs):
        if pair % 2:
            their_s, our_s = theirs(steps), ours(steps)
        else:
            our_s, their_s = ours(steps), theirs(steps)
        print(f"pair {pair + 1}: ours {our_s * 1000:.1f} ms, theirs {their_s * 1000:.1f} ms, {our_s / their_s:.3f}")
        ratios.append(our_s / their_s)
    return ratios


def compare(workers: int, pairs: int, steps: int, folder: Path) -> tuple[list[float], float]:
    """The ratios of step times, and that of peak memory."""
    with Baseline("benchmarks.overhead:recipe", num_workers=workers) as baseline:
        baseline.run(WARM_UP_STEPS)
        run = Ours(workers, folder)
        try:
            ratios = turns(run.segment, lambda n: statistics.fmean(baseline.run(n).step_s), pairs, steps)
            memory = run.peak_bytes() / max(baseline.run(1).peak_rss_bytes)
        finally:
            run.close()
    return ratios, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    pairs, steps = (3, 16) if options.quick else (9, 40)
    with tempfile.TemporaryDirectory() as folder:
        over_ddp, memory = compare(2, pairs, steps, Path(folder))
        over_plain, _ = compare(1, pairs, steps, Path(folder))
    figures = {
        "ratio_vs_ddp": round(statistics.median(over_ddp), 3),
        "ratio_vs_plain": round(statistics.median(over_plain), 3),
        "memory_over_ddp": round(memory, 3),
        "parameters": sum(p.numel() for p in build().parameters()),
    }
    spread = {"ratio_vs_ddp": median_and_spread(over_ddp), "ratio_vs_plain": median_and_spread(over_plain)}
    finish(
        "overhead",
        figures,
        {"quick": options.quick, "pairs": pairs, "steps": steps, "batch_a_worker": BATCH_A_WORKER, "spread": spread},
    )


if __name__ == "__main__":
    main()
