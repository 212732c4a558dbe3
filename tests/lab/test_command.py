"""The command `shoal lab`, on real labs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.lab import discard, kernel, labs, plan, why_not

pytestmark = pytest.mark.cluster

SHOAL = str(Path(sys.executable).with_name("shoal"))
NAME = f"c{os.getpid()}"[-10:]
PATIENCE_S = 90.0


@pytest.fixture(autouse=True)
def _has_the_right() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def standing() -> Iterator[str]:
    """A lab that stays."""
    assert lab("up", "--hosts", 2, "--link", "50mbit", "--name", NAME).returncode == 0
    yield NAME
    if any(record.name == NAME for record in labs()):
        discard(NAME)


def lab(*words: object) -> subprocess.CompletedProcess[str]:
    command = [SHOAL, "lab", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def is_gone(name: str) -> bool:
    has_bridge = kernel.is_up(plan.bridge(name)) is not None
    return not has_bridge and not any(record.name == name for record in labs())


def test_a_command_runs_in_a_lab_that_is_gone_afterwards():
    ran = lab("run", "--hosts", 2, "--name", NAME, "--", "sh", "-c", 'cat "$SHOAL_HOSTS"; exit 7')
    assert ran.returncode == 7
    told = json.loads(ran.stdout)
    assert [host["name"] for host in told["hosts"]] == ["h0", "h1"]
    assert told["driver"].rsplit(".", 1)[0] == told["hosts"][1]["address"].rsplit(".", 1)[0]
    assert is_gone(NAME)


def test_a_command_that_a_signal_ends_says_so_with_its_exit_code():
    assert lab("run", "--hosts", 1, "--", "sh", "-c", "kill -9 $$").returncode == 137


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_and_the_lab(number, code):
    command = [SHOAL, "lab", "run", "--hosts", "1", "--name", NAME, "--", "sh", "-c", "echo begun; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "begun\n"
        os.killpg(run.pid, number)
        assert run.wait(PATIENCE_S) == code
    assert is_gone(NAME)


def test_faults_come_in_their_time(tmp_path):
    (tmp_path / "faults.toml").write_text('[[fault]]\nat_s = 0.0\nhost = 1\ndo = "slow"\nto = "5mbit"\n')
    script = f'until {SHOAL} lab status --json | grep -q "5mbit"; do :; done'
    ran = lab("run", "--hosts", 2, "--link", "50mbit", "--faults", tmp_path / "faults.toml", "--", "sh", "-c", script)
    assert ran.returncode == 0
    assert "slow h1 to 5mbit" in ran.stderr


def test_a_lab_that_stays_is_looked_at_used_hurt_and_taken_down(standing):
    ran = lab("exec", "--name", standing, "h1", "--", "sh", "-c", "echo $SHOAL_LAB; exit 5")
    assert (ran.returncode, ran.stdout) == (5, f"{standing}\n")
    assert lab("fault", "--name", standing, "cut", 1).returncode == 0
    hosts = json.loads(lab("status", standing, "--json").stdout)[0]["hosts"]
    assert [host["is_cut"] for host in hosts] == [False, True]
    assert lab("fault", "--name", standing, "heal", "h1").returncode == 0
    measured = lab("status", standing, "--measure")
    assert measured.returncode == 0, measured.stdout
    assert "50mbit" in measured.stdout and "47.82 allowed" in measured.stdout
    assert lab("down", standing).returncode == 0
    assert is_gone(standing)


def test_its_status_is_what_the_kernel_does_and_not_what_was_asked_for(standing):
    subprocess.run(["tc", "qdisc", "del", "dev", plan.outer(standing, 1), "root"], check=True)
    rows = json.loads(lab("status", standing, "--json").stdout)
    assert rows[0]["hosts"][1]["link"] == "50mbit/none"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--hosts", "2", "--link", "0mbit", "--", "true"], "a rate must be from 64kbit to 100gbit"),
        (["run", "--hosts", "0", "--", "true"], "from 1 to 200 hosts"),
        (["run", "--hosts", "1", "--", "no-such-command"], "no-such-command"),
        (["run", "--hosts", "1", "--faults", "none.toml", "--", "true"], "none.toml cannot be read"),
        (["up", "--hosts", "1", "--name", "a-name-that-is-long"], "at most 10"),
        (["down", "nosuch"], "no lab named 'nosuch'"),
        (["status", "nosuch"], "no lab named 'nosuch'"),
        (["exec", "--name", "nosuch", "1", "--", "true"], "no lab named 'nosuch'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(words, said):
    ran = lab(*words)
    assert ran.returncode == 2
    assert said in ran.stderr


def test_a_name_in_use_is_refused(standing):
    ran = lab("run", "--hosts", 1, "--name", standing, "--", "true")
    assert ran.returncode == 2
    assert f"shoal lab down {standing}" in ran.stderr
