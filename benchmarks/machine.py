"""Where figures were measured, how they are summed up, and where they are kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge a figure: processor, cores, memory (bytes), system, versions, load, congestion."""
    return {
        "processor": _first_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "load_1min": os.getloadavg()[0],
        "tcp_congestion": _read("/proc/sys/net/ipv4/tcp_congestion_control"),
    }


def median_and_spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the least, the greatest and the quartiles of at least one value."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "min": min(values), "max": max(values), "quartile_1": low, "quartile_3": high}


def finish(name: str, figures: Mapping[str, Any], config: Mapping[str, Any], seed: int | None = None) -> None:
    """Keep the result and print the figures as the last line: one JSON object.

    It is kept in ``results/NAME.json``, or in ``results/quick/`` if the config says ``quick``.
    """
    result = {
        "benchmark": name,
        "figures": dict(figures),
        "config": dict(config),
        "seed": seed,
        "commit": commit(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
    }
    folder = RESULTS / "quick" if config.get("quick") else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures), flush=True)


def commit() -> str | None:
    """The checkout's commit, with ``+`` if files differ from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + "+" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_rss_bytes(pid: int | None = None) -> int:
    """The most memory that was ever resident in a process (VmHWM), this one if none is named. Linux only."""
    value = _first_value(f"/proc/{pid or 'self'}/status", "VmHWM")
    if value is None:
        raise OSError("peak memory needs Linux's /proc, with VmHWM in a process's status; measure on Linux")
    return int(value.split()[0]) * 1024


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _first_value(path: str, key: str) -> str | None:
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
