"""`shoal serve` ends by SIGTERM before it serves, also where it is the first process of a container."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

UNSHARE = ["unshare", "--fork", "--pid", "--mount-proc"]
PATIENCE_S = 120.0
SHOAL = [sys.executable, "-c", "from shoal.cli import main; main()"]


def may_unshare() -> bool:
    return (
        shutil.which(UNSHARE[0]) is not None and not subprocess.run([*UNSHARE, "true"], capture_output=True).returncode
    )


def only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def ended_while_it_reads_its_run(tmp_path: Path, before: Sequence[str]) -> int:
    """The exit code of a service that gets SIGTERM as soon as it reads its run's record, which never comes."""
    record = tmp_path / "runs" / "run" / "run.json"
    record.parent.mkdir(parents=True)
    os.mkfifo(record)
    words = [*before, *SHOAL, "serve", "run", "--port", "0"]
    environment = {**os.environ, "SHOAL_RUNS": str(tmp_path / "runs")}
    with subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            with record.open("wb"):  # once it is opened there, too
                os.kill(only_child(process.pid) if before else process.pid, signal.SIGTERM)
            return process.wait(PATIENCE_S)  # one that ignores the signal has read a record that is none: 2
        finally:
            process.kill()


def test_a_service_that_does_not_serve_yet_ends_by_sigterm(tmp_path: Path):
    assert ended_while_it_reads_its_run(tmp_path, []) == -signal.SIGTERM


def test_so_does_one_that_is_the_first_process_of_a_container(tmp_path: Path):
    if not may_unshare():
        pytest.skip("a process namespace cannot be made here: it takes unshare and the right to use it")
    assert ended_while_it_reads_its_run(tmp_path, UNSHARE) == 128 + signal.SIGTERM
