from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers.processes import Command, Tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes by Linux's /proc")
DEADLINE_S = 20.0
ORPHAN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "w").write(f"{child.pid}\\n")
"""
DIES_ONCE = """
import os, signal, sys, time
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
if open(sys.argv[1]).read().count("\\n") == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


def lines_of(path: Path, count: int, tree: Tree) -> list[int]:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        tree.revive()
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len([line for line in lines if line.endswith("\n")]) >= count:
            return [int(line) for line in lines]
    raise AssertionError(f"{count} lines were expected in {path}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_child_in_a_session_of_its_own_ends_with_the_tree(tmp_path: Path) -> None:
    said = tmp_path / "pids"
    command = Command(arguments=[sys.executable, "-c", ORPHAN, str(said)])
    with Tree([command], tmp_path / "output") as tree:
        [child] = lines_of(said, 1, tree)
        assert is_alive(child)
    assert not is_alive(child)


def test_a_revived_program_that_a_signal_ended_starts_again(tmp_path: Path) -> None:
    said = tmp_path / "pids"
    command = Command(arguments=[sys.executable, "-c", DIES_ONCE, str(said)], revived=True)
    with Tree([command], tmp_path / "output") as tree:
        first, second = lines_of(said, 2, tree)
    assert first != second
    assert not is_alive(second)
    assert first != os.getpid()


def test_a_program_that_ends_with_an_error_is_reported(tmp_path: Path) -> None:
    with Tree([Command(arguments=[sys.executable, "-c", "raise SystemExit(3)"])], tmp_path / "output") as tree:
        deadline = time.monotonic() + DEADLINE_S
        while not tree.failed() and time.monotonic() < deadline:
            pass
        assert tree.failed()
