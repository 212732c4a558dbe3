"""Runs of Shoal on the hosts of a lab, for benchmarks: begun, watched, disturbed and ended; and what they committed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import shoal
from shoal.comm import messages as msg
from shoal.events import Event, read_events
from shoal.lab import Lab
from shoal.training.commanding import command
from shoal.training.folder import RunFolder

JOB = Path(__file__).parent / "lab_job.py"
SHOAL = Path(sys.executable).with_name("shoal")
WORKERS = 4

_POLL_S = 0.05
_PATIENCE_S = 90.0


@dataclass(frozen=True)
class Commits:
    """When (seconds since 1970, rising) which step was committed."""

    times: tuple[float, ...]
    steps: tuple[int, ...]

    @staticmethod
    def of(events: Sequence[Event]) -> Commits:
        """Those that the log tells; a step that is told again counts at its first time."""
        times: list[float] = []
        steps: list[int] = []
        for at_s, step in sorted((e["at_s"], e["step"]) for e in events if e["kind"] == "progress"):
            if not steps or step > steps[-1]:
                times.append(at_s)
                steps.append(step)
        return Commits(tuple(times), tuple(steps))

    def step_at(self, at_s: float) -> float:
        """The step reached, evenly between one commit and the next; what is not followed by a commit adds nothing."""
        after = bisect_right(self.times, at_s)
        if after == 0:
            return float(self.steps[0])
        if after == len(self.times):
            return float(self.steps[-1])
        begun_s, ended_s = self.times[after - 1 : after + 1]
        part = (at_s - begun_s) / (ended_s - begun_s)
        return self.steps[after - 1] + part * (self.steps[after] - self.steps[after - 1])

    def steps_per_s(self, from_s: float, until_s: float) -> float:
        """Committed steps a second in a window."""
        return (self.step_at(until_s) - self.step_at(from_s)) / (until_s - from_s)

    def longest_gap(self, from_s: float, until_s: float) -> float:
        """Seconds of the longest time without a commit that overlaps with the window; if it never ended, to its end."""
        times = [*self.times, until_s] if until_s > self.times[-1] else self.times
        return max((b - a for a, b in pairwise(times) if b > from_s and a < until_s), default=0.0)

    def settled_after(self, from_s: float, until_s: float, least_per_s: float, window_s: float = 2.0) -> float | None:
        """Seconds from ``from_s`` to the first window with ``least_per_s`` steps a second; None if there is none."""
        starts = self.times[bisect_left(self.times, from_s) : bisect_right(self.times, until_s - window_s)]
        fast = (at_s for at_s in starts if self.steps_per_s(at_s, at_s + window_s) >= least_per_s)
        return next((at_s - from_s for at_s in fast), None)


@dataclass(frozen=True)
class Phase:
    """A part of a run in which the same was done to it, in seconds since 1970."""

    from_s: float
    until_s: float

    def last(self, duration_s: float) -> Phase:
        """Its end."""
        return Phase(max(self.from_s, self.until_s - duration_s), self.until_s)

    def count(self, events: Sequence[Event], *kinds: str) -> int:
        """How many events of these kinds it saw."""
        return sum(e["kind"] in kinds and self.from_s < e["at_s"] <= self.until_s for e in events)


def lanes_of(events: Sequence[Event]) -> Mapping[str, int]:
    """How many lanes each worker has now."""
    return next((e["lanes"] for e in reversed(events) if e["kind"] in ("generation", "deal")), {})


def pids_by_host(events: Sequence[Event]) -> dict[str, int]:
    """The process of each worker that is alive as far as is known, by its host's address."""
    alive: dict[str, Event] = {}
    for event in events:
        if event["kind"] == "joined":
            alive[event["worker"]] = event
        elif event["kind"] in ("lost", "dismissed"):
            alive.pop(event["worker"], None)
    return {event["host"]: event["pid"] for event in alive.values()}


class LabRun:
    """``benchmarks.lab_job`` on the hosts of a lab, one worker each, until the block ends. ``env``: for its processes.

    The driver is a process of its own, `shoal train`, so that runs with other environments can go on at a time.
    """

    def __init__(self, lab: Lab, folder: Path, name: str, settings: Sequence[str] = (), **env: Any) -> None:
        self.name = name
        self.path = folder / name
        self.folder = RunFolder(self.path.resolve())
        self._events: list[Event] = []
        self._offset = 0
        self._log = folder / f"{name}.log"
        words = [str(SHOAL), "train", str(JOB), "--workers", str(WORKERS), "--on", "hosts", "--name", name, "--quiet"]
        for setting in settings:
            words += ["--set", setting]
        given = {"SHOAL_RUNS": str(folder), **lab.env, **{key: str(value) for key, value in env.items()}}
        self._env = {**os.environ, **given}
        with self._log.open("wb") as log:
            self._driver = subprocess.Popen(words, env=self._env, stdout=log, stderr=log, start_new_session=True)

    def __enter__(self) -> LabRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._driver.poll() is None:
            self._driver.terminate()
            try:
                self._driver.wait(_PATIENCE_S / 3)
            except subprocess.TimeoutExpired:
                self._driver.kill()
                self._driver.wait()

    def check(self) -> None:
        """``ShoalError`` if the run has ended by itself, which it never should."""
        if self._driver.poll() is not None:
            raise shoal.ShoalError(f"the run {self.name} has ended: {self._log.read_text()[-2000:]}")

    @property
    def events(self) -> list[Event]:
        """All that has happened so far."""
        new, self._offset = read_events(self.folder.events_path, self._offset)
        self._events += new
        return self._events

    @property
    def commits(self) -> Commits:
        return Commits.of(self.events)

    def until(self, found: Callable[[list[Event]], bool]) -> None:
        """Wait for what is to be found among the events."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while not found(self.events):
            self.check()
            if time.monotonic() > deadline_s:
                log = self._log.read_text()[-2000:]
                raise shoal.ShoalError(f"{self.name} is not where it should be after {_PATIENCE_S:g} s: {log}")
            time.sleep(_POLL_S)

    def until_all_commit(self, num_commits: int = 2) -> None:
        """Wait until every worker has lanes, and for some commits from then on."""
        self.until(lambda events: sum(count > 0 for count in lanes_of(events).values()) == WORKERS)
        since_s = time.time()
        self.until(lambda events: sum(e["kind"] == "progress" and e["at_s"] > since_s for e in events) >= num_commits)

    def phase(self, duration_s: float) -> Phase:
        """Let it go on for so long."""
        begun_s = time.time()
        while (left_s := begun_s + duration_s - time.time()) > 0:
            time.sleep(min(left_s, 0.5))
            self.check()
        return Phase(begun_s, begun_s + duration_s)

    def stop(self) -> None:
        """Have the newest step stored, and end it."""
        command(self.folder, msg.Stop(reason="the benchmark is over"))
        try:
            self._driver.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise shoal.ShoalError(f"{self.name} does not end {_PATIENCE_S:g} s after it was told to") from None

    def account(self) -> Accounts:
        """Whether each sample counts as often as it should, once the run is stopped. Loads torch."""
        os.environ.update(self._env)  # the job of this run
        books = shoal.account(shoal.Run(self.path))
        if not self._env["LAB_JOB_STRATEGY"].startswith("allreduce"):
            return Accounts(books.taken, books.lost, books.repeated)
        counts = num_commits(shoal.load_model(self.path), int(self._env["LAB_JOB_BATCH"]))
        lost, repeated = lost_and_repeated(counts, books.due)
        return Accounts(books.taken, max(books.lost, lost), max(books.repeated, repeated))


@dataclass(frozen=True)
class Accounts:
    """Samples committed, and how many of them too seldom or too often."""

    taken: int
    lost: int
    repeated: int


def num_commits(model: Any, global_batch: int) -> list[float]:
    """How often each sample was committed, by the model's own count."""
    counted: list[float] = (-model.counts.detach() * global_batch).round(decimals=6).tolist()
    return counted


def lost_and_repeated(counts: Sequence[float], due: int) -> tuple[int, int]:
    """Of samples that were committed so often each, ``due`` times in all: how many are missing, and are too many.

    Each was due once an epoch, so that no two counts may differ by more than one. A part of a sample is a lost one.
    """
    least = due // len(counts)
    most = least + (due % len(counts) > 0)
    lost = sum(count < least or count % 1 != 0 for count in counts)
    repeated = sum(count > most for count in counts)
    return max(lost, round(due - sum(counts))), max(repeated, round(sum(counts) - due))
