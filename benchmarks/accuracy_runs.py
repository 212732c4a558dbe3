"""The runs that time to accuracy is told by: ours on the hosts of a lab, DDP on the same, the plain loop on none."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shoal
from benchmarks import accuracy_traces
from benchmarks.accuracy_traces import Trace
from benchmarks.machine import REPOSITORY
from shoal.comm import messages as msg
from shoal.events import read_events
from shoal.lab import Lab, LabSpec
from shoal.training.commanding import command
from shoal.training.folder import RunFolder

HOSTS = 4
HERE = Path(__file__).parent
LIMIT_S = 1500.0
POLL_S = 0.2


@dataclass(frozen=True)
class Benches:
    """Two labs of 4 hosts: ``shaped`` at 100 Mbit/s, and ``free`` whose links have no limit. Results go to a folder."""

    shaped: Lab
    free: Lab
    folder: Path

    def ours(
        self, setting: str, *, seed: int = 0, free: bool = False, job: str = "accuracy_job.py", until: float = 1.0
    ) -> Trace:
        """A run of Shoal's with one of the job's settings, until the accuracy or to the end of its schedule."""
        lab = self.free if free else self.shaped
        runs = Path(tempfile.mkdtemp(dir=self.folder))
        environment = {
            **lab.env, "SHOAL_RUNS": str(runs), "PYTHONPATH": str(REPOSITORY),
            "ACCURACY_STRATEGY": setting, "ACCURACY_SEED": str(seed),
        }  # fmt: skip
        os.environ.update(environment)

        def run() -> list[dict[str, Any]]:
            options = shoal.TrainOptions(quiet=True)
            with _stopped_at(runs / setting, until):
                return shoal.train(HERE / job, workers=HOSTS, on="hosts", name=setting, options=options).events

        return _counted(setting, lab, run)

    def ddp(self, hook: str, *, until: float, evaluate_from: int, seed: int = 0) -> Trace:
        """DistributedDataParallel for real at 100 Mbit/s, until the accuracy is reached."""
        worker = _worker(
            "--hook", hook, "--until", str(until), "--seed", str(seed), "--evaluate-from", str(evaluate_from)
        )
        return self.peer(f"ddp_{hook}" if hook != "none" else "ddp", worker)

    def peer(self, name: str, worker: Callable[[int, int, Path], Sequence[str]]) -> Trace:
        """A peer's workers, one on each host; rank 0's events are its trace. ``RuntimeError`` if one fails."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))

        def run() -> list[dict[str, Any]]:
            with (folder / "log").open("w") as log:
                workers = [
                    host.popen(
                        worker(host.number, HOSTS, folder), env=ENVIRONMENT, cwd=REPOSITORY, stdout=log, stderr=log
                    )
                    for host in self.shaped.hosts
                ]  # fmt: skip
                _wait(name, workers, folder / "log")
            return read_events(folder / "events.jsonl")[0]

        return _counted(name, self.shaped, run)


@contextmanager
def _stopped_at(path: Path, until: float) -> Iterator[None]:
    """Within this the run in ``path`` is told to stop as soon as it has reached the accuracy."""
    over = threading.Event()

    def watch() -> None:
        folder, offset = RunFolder(path), 0
        while not over.wait(POLL_S):
            events, offset = read_events(folder.events_path, offset)
            if any(e["kind"] == "evaluated" and e["figures"].get("accuracy", 0.0) >= until for e in events):
                command(folder, msg.Stop(reason="the accuracy is reached"))
                return

    watcher = threading.Thread(target=watch)
    if until < 1:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if until < 1:
            watcher.join()


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def spec(link: str) -> LabSpec:
    """4 hosts with such links."""
    return LabSpec(hosts=HOSTS, link=link, warm=True)


def plain(folder: Path, *, evaluate_from: int) -> Trace:
    """DDP's optimisation in one process and without an exchange: for its steps, not for its time."""
    place = Path(tempfile.mkdtemp(dir=folder))
    worker = _worker("--evaluate-from", str(evaluate_from))
    command, environment = worker(0, 1, place), os.environ | ENVIRONMENT
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
    return accuracy_traces.trace("plain", read_events(place / "events.jsonl")[0])


def _worker(*flags: str) -> Callable[[int, int, Path], list[str]]:
    """The command of a worker of ``benchmarks.accuracy_ddp``."""
    module = [sys.executable, "-m", "benchmarks.accuracy_ddp"]
    return lambda rank, world_size, folder: [*module, str(rank), str(world_size), str(folder), *flags]


def _counted(name: str, lab: Lab, run: Callable[[], list[dict[str, Any]]]) -> Trace:
    before = [lab.bytes(host)[0] for host in lab.hosts]
    events = run()
    sent = sum(lab.bytes(host)[0] for host in lab.hosts) - sum(before)
    found = accuracy_traces.trace(name, events)
    num_steps = found.points[-1].step if found.points else 1
    return accuracy_traces.trace(name, events, sent / len(before) / num_steps)


def _wait(name: str, workers: Sequence[subprocess.Popen[Any]], log: Path) -> None:
    """Until all have ended; if one fails, the others are ended too."""
    limit_s = time.monotonic() + LIMIT_S
    try:
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers) or time.monotonic() > limit_s:
                said = log.read_text().strip().splitlines()
                raise RuntimeError(f"{name} failed: {said[-1] if said else 'no worker ended in time'}")
            time.sleep(0.1)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
