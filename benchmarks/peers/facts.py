"""Reads what the workers of one trial write down, while they write it."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.peers.peers import NUM_WORKERS


class Facts:
    """What the workers of one trial have written down so far."""

    def __init__(self, folder: Path) -> None:
        self.all: list[dict[str, Any]] = []
        self.pids: dict[int, int] = {}
        """Rank to the process that bears it now."""
        self._folder = folder
        self._read_bytes: dict[Path, int] = {}
        self._newest = 0
        self._finished = False

    def read(self) -> None:
        """Take in every whole line that was added."""
        for path in self._folder.glob("worker-*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read_bytes.get(path, 0))
                whole, _, _ = file.read().rpartition(b"\n")
            if whole:
                self._read_bytes[path] = self._read_bytes.get(path, 0) + len(whole) + 1
                for line in whole.splitlines():
                    self._take(json.loads(line))

    def reached(self, step: int) -> bool:
        """Whether any worker has committed the step, and every rank has a process."""
        return self._newest >= step and len(self.pids) == NUM_WORKERS

    def finished(self) -> bool:
        """Whether any worker has finished the epoch."""
        return self._finished

    def step_s(self) -> float:
        """The median time between two commits of rank 0."""
        times: list[float] = [fact["t"] for fact in self.all if fact["event"] == "commit" and fact["rank"] == 0]
        return statistics.median(later - earlier for earlier, later in pairwise(times))

    def _take(self, fact: dict[str, Any]) -> None:
        self.all.append(fact)
        match fact["event"]:
            case "start":
                self.pids[fact["rank"]] = fact["pid"]
            case "commit":
                self._newest = max(self._newest, fact["step"])
            case "finish":
                self._finished = True
