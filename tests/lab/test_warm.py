"""Forks that take a command's place on a host: they are where it would have been, and end as it would have ended."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.lab import Lab, LabSpec, why_not
from shoal.lab.records import warm_path

pytestmark = pytest.mark.cluster

LOOK = """
import json, os, sys
loaded = sorted({"torch", "numba", "shoal"} & set(sys.modules))
print(json.dumps({
    "argv": sys.argv[1:], "folder": os.getcwd(), "given": os.environ.get("GIVEN"), "loaded": loaded,
    "input": sys.stdin.read(), "space": os.stat("/proc/self/ns/net").st_ino, "main": __name__,
    "group": open("/proc/self/cgroup").read(), "path": sys.path[0], "random": __import__("numpy").random.rand(),
}))
sys.exit(7)
"""
LAST = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
print("ready", flush=True)
time.sleep(60)
"""
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if reason := why_not():
        pytest.skip(reason)
    with Lab(LabSpec(hosts=2, warm=True)) as made:
        yield made


@pytest.fixture
def look(tmp_path: Path) -> Path:
    (tmp_path / "look.py").write_text(LOOK)
    return tmp_path / "look.py"


def lasting(lab: Lab, tmp_path: Path) -> subprocess.Popen[str]:
    (tmp_path / "last.py").write_text(LAST)
    child = lab.hosts[0].popen([sys.executable, str(tmp_path / "last.py")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


@contextmanager
def ends(lab: Lab, child: subprocess.Popen[str]) -> Iterator[int]:
    """The fork that stands behind a command; it is to have ended soon after this."""
    (fork,) = set(lab.hosts[0].pids()) - {child.pid}
    watched = os.pidfd_open(fork)
    try:
        yield fork
        assert select.select([watched], [], [], PATIENCE_S)[0], "a fork has outlived who asked for it"
    finally:
        os.close(watched)


def test_a_fork_is_where_the_command_would_have_been(lab: Lab, look: Path) -> None:
    found = []
    for host in lab.hosts:
        words = [sys.executable, str(look), "one", "two words"]
        ran = host.run(words, {"GIVEN": "this"}, input="typed", capture_output=True, text=True, cwd=look.parent)
        assert (ran.returncode, ran.stderr) == (7, "")
        found.append(json.loads(ran.stdout))
        assert found[-1]["space"] == os.stat(f"/run/netns/{host.namespace}").st_ino
        group = lab.record.hosts[host.number].group
        assert group is None or Path(group).name in found[-1]["group"]
    first = found[0]
    assert (first["argv"], first["folder"], first["given"]) == (["one", "two words"], str(look.parent), "this")
    assert (first["input"], first["main"], first["path"]) == ("typed", "__main__", str(look.parent))
    assert first["loaded"] == ["numba", "torch"], "of Shoal nothing may be loaded that could be out of date"
    assert found[0]["random"] != found[1]["random"]


def test_a_module_is_run_from_the_folder_and_from_pythonpath(lab: Lab, look: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for env, folder in (({}, look.parent), ({"PYTHONPATH": str(look.parent)}, elsewhere)):
        ran = lab.hosts[0].run([sys.executable, "-m", "look", "x"], env, capture_output=True, input=b"", cwd=folder)
        assert (ran.returncode, json.loads(ran.stdout)["argv"]) == (7, ["x"])


def test_another_command_is_itself(lab: Lab) -> None:
    ran = lab.hosts[1].run(["sh", "-c", "echo $0; exit 4", "this"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (4, "this\n")
    ran = lab.hosts[1].run([sys.executable, "-c", "import sys; print('torch' in sys.modules)"], capture_output=True)
    assert ran.stdout == b"False\n"


def test_a_signal_is_passed_on(lab: Lab, tmp_path: Path) -> None:
    with lasting(lab, tmp_path) as child, ends(lab, child):
        child.terminate()
        assert child.wait(PATIENCE_S) == 9


def test_a_fork_does_not_outlive_who_asked_for_it(lab: Lab, tmp_path: Path) -> None:
    with lasting(lab, tmp_path) as child, ends(lab, child):
        child.kill()


def test_how_a_fork_is_killed_is_how_the_command_ends(lab: Lab, tmp_path: Path) -> None:
    with lasting(lab, tmp_path) as child, ends(lab, child) as fork:
        os.kill(fork, signal.SIGABRT)
        assert child.wait(PATIENCE_S) == -signal.SIGABRT


@pytest.mark.parametrize("said", [b"", b"\x00", (1000).to_bytes(4, "big"), (1000).to_bytes(4, "big") + b'{"argv":'])
def test_one_that_dies_while_it_asks_does_not_hold_up_the_others(lab: Lab, look: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(warm_path(lab.name)))
        asker.sendall(said)
    ran = lab.hosts[0].run([sys.executable, str(look)], capture_output=True, input=b"", timeout=PATIENCE_S)
    assert ran.returncode == 7


def test_one_that_is_frozen_while_it_asks_does_not_hold_up_the_others_for_long(lab: Lab, look: Path) -> None:
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(warm_path(lab.name)))
        asker.sendall((1000).to_bytes(4, "big"))
        ran = lab.hosts[0].run([sys.executable, str(look)], capture_output=True, input=b"", timeout=PATIENCE_S)
        assert ran.returncode == 7


def test_nothing_is_left_of_a_warm_lab() -> None:
    if reason := why_not():
        pytest.skip(reason)
    with Lab(LabSpec(hosts=1, warm=True)) as made:
        server, path = made.record.warm, warm_path(made.name)
        assert server is not None and server.is_alive
        assert Lab.find(made.name).spec.warm
    assert not server.is_alive and not path.exists()
