"""A lab for one who is not root, in a user namespace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from shoal.lab import kernel

pytestmark = pytest.mark.cluster

NOBODY = "65534"
PATIENCE_S = 120.0
AS_NOBODY = f"""
mount --bind "$0" "$1" && shift &&
exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups --inh-caps=-all --bounding-set=-all "$@"
"""
"""An interpreter that lies where only root may look is shown to nobody at another place."""


@pytest.fixture
def shoal() -> Iterator[Sequence[str]]:
    """The words that run the command without any rights."""
    here = "from shoal.cli import main; main()"
    if os.geteuid() != 0:
        yield [sys.executable, "-c", here]
        return
    if missing := [tool for tool in ("unshare", "setpriv", "ip", "tc") if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    paths = os.pathsep.join(path for path in sys.path if path)
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    with tempfile.TemporaryDirectory(prefix="shoal-python-") as python:  # pytest's own are for its user only
        Path(python).chmod(0o755)
        as_nobody = ["unshare", "--mount", "--", "sh", "-c", AS_NOBODY, sys.base_prefix, python]
        yield [*as_nobody, "env", f"PYTHONPATH={paths}", f"{python}/bin/{name}", "-c", here]


def ask(shoal: Sequence[str], *words: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    return subprocess.run(
        [*shoal, "lab", *words], capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=env, cwd="/"
    )


def test_who_is_not_root_has_a_lab_of_their_own_while_a_command_runs(shoal):
    script = "ip -br addr | grep b.*UP; for i in 1 2 3; do cat /proc/net/dev | grep -c o$((i-1)):; done; exit 4"
    ran = ask(shoal, "run", "--hosts", "2", "--link", "20mbit", "--", "sh", "-c", script)
    if "does not let users make one" in ran.stderr:
        pytest.skip(f"needs a kernel that lets users make namespaces: {ran.stderr}")
    assert ran.returncode == 4, ran.stderr
    assert ran.stdout.split()[-3:] == ["1", "1", "0"]
    assert "10.83.0.1/24" in ran.stdout, "it has all networks for itself"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up", "--hosts", "1"], "run as root, or use `shoal lab run`"),
        (["run", "--hosts", "1", "--cpu", "0.5", "--", "true"], "a share of the processor needs a cgroup"),
        (["run", "--hosts", "1", "--link", "fast", "--", "true"], "a rate is a number"),
    ],
)
def test_what_cannot_be_had_without_root_is_said(shoal, words, said):
    ran = ask(shoal, *words)
    if "does not let users make one" in ran.stderr:
        pytest.skip(f"needs a kernel that lets users make namespaces: {ran.stderr}")
    assert ran.returncode == 2
    assert said in ran.stderr


def test_a_kernel_that_lets_users_make_no_namespace_is_told_of(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(os.devnull)))
    assert kernel.why_no_user_namespace() == "that needs unshare, of util-linux"
    assert "apt install iproute2" in kernel.why_not()
