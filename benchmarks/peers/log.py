"""What a peer's worker writes down: one JSON line a fact, in a file of its own. Needs nothing but Python."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class WorkerLog:
    """``worker-RANK.jsonl``, kept across restarts. A line is with the kernel when a call returns: kill -9 loses none.

    ``group`` names the workers that make a step together; other workers, or the same ones started anew, have another.
    Steps count from 1.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._rank = rank
        self._file = open(folder / f"worker-{rank}.jsonl", "a", buffering=1)  # noqa: SIM115

    def started(self) -> None:
        """This process is the one that bears the rank now."""
        self._write({"event": "start", "pid": os.getpid()})

    def offered(self, step: int, group: str, samples: list[int]) -> None:
        """The gradient of these sample ids is about to be reduced.

        If any of the group commits the step, then these samples are in it: a reduction ends only with every part.
        """
        self._write({"event": "offer", "step": step, "group": group, "samples": samples})

    def committed(self, step: int, group: str) -> None:
        """The optimizer has made this step."""
        self._write({"event": "commit", "step": step, "group": group})

    def finished(self) -> None:
        """This worker's epoch is over."""
        self._write({"event": "finish"})

    def _write(self, fact: dict[str, Any]) -> None:
        self._file.write(json.dumps({"t": time.monotonic(), "rank": self._rank, **fact}) + "\n")
