"""An environment of its own for each peer, made when it is first needed under ``benchmarks/.envs/NAME``."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.machine import REPOSITORY

ENVS = REPOSITORY / "benchmarks" / ".envs"


def pins(peer: str) -> dict[str, str]:
    """Distribution to exact version, from ``NAME.txt``; torch comes first, if the peer uses it."""
    lines = _pins_file(peer).read_text().split()
    return dict(line.split("==") for line in lines)


def python_of(peer: str) -> Path:
    """The peer's interpreter. The first call, and one after its pins changed, installs it: minutes, and up to 2 GB."""
    home = ENVS / peer
    python, marker = home / "bin" / "python", home / "installed.txt"
    wanted = _pins_file(peer)
    if marker.exists() and marker.read_text() == wanted.read_text():
        return python
    print(f"installing {peer} into {home}", file=sys.stderr, flush=True)
    venv.create(home, clear=True, with_pip=True)
    # Torch by itself first, so that no peer decides which build of it is installed.
    first = [[f"torch=={version}"] for name, version in pins(peer).items() if name == "torch"]
    for what in (*first, ["-r", str(wanted)]):
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *what]
        subprocess.run(command, check=True, stdout=sys.stderr)
    marker.write_text(wanted.read_text())
    return python


def _pins_file(peer: str) -> Path:
    return Path(__file__).parent / f"{peer}.txt"
