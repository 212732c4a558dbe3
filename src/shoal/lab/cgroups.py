"""A host's share of the processor: a cgroup, of version 1 or 2, that its processes are put in before they begin."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import ConfigError, Fault

PERIOD_US = 20_000
"""A group that has used up its share rests until the end of the period, so this is how finely the share is cut."""

_EMPTY_S = 10.0


@dataclass(frozen=True)
class Groups:
    """Where groups can be made. ``version``: of cgroups."""

    root: Path
    version: int


def find(mounts: str | None = None) -> Groups | None:
    """The place where this process may limit the processor; None if there is none. ``mounts``: /proc/mounts' text."""
    text = mounts if mounts is not None else Path("/proc/mounts").read_text()
    for line in text.splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(",") and os.access(where, os.W_OK):
            return Groups(Path(where), 1)
        if kind == "cgroup2" and os.access(where, os.W_OK) and _offers_cpu(Path(where)):
            return Groups(Path(where), 2)
    return None


def _offers_cpu(root: Path) -> bool:
    """Whether version 2 can limit the processor of groups in ``root``, and has been told to."""
    control = root / "cgroup.subtree_control"
    try:
        if "cpu" not in control.read_text().split() and "cpu" in (root / "cgroup.controllers").read_text().split():
            control.write_text("+cpu")
        return "cpu" in control.read_text().split()
    except OSError:
        return False


def limit(group: Path, cores: float | None) -> None:
    """Let a group use ``cores`` of the processor from now on; None: all."""
    quota = None if cores is None else round(cores * PERIOD_US)
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{'max' if quota is None else quota} {PERIOD_US}")
        return
    (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
    (group / "cpu.cfs_quota_us").write_text(str(-1 if quota is None else quota))


def limited_to(group: Path) -> float | None:
    """The cores that a group may use, by the kernel's own account; None: all."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):  # it was removed, before it was opened or before it was read
            return None
        raise
    return None if quota in ("max", "-1") else int(quota) / int(period)


def entering(group: str | None) -> tuple[str, ...]:
    """The words that put a command in a group before it begins."""
    if group is None:
        return ()
    return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', f"{group}/cgroup.procs")


def remove(group: Path) -> None:
    """Delete a group once its processes are gone. The kernel may be a moment behind."""
    deadline_s = time.monotonic() + _EMPTY_S
    while group.exists():
        with suppress(FileNotFoundError, OSError):
            group.rmdir()
            return
        if time.monotonic() > deadline_s:
            raise Fault(f"{group} still holds processes {_EMPTY_S:g} s after its host's were killed")
        time.sleep(0.005)


def needed() -> ConfigError:
    """What to say where there is no such place."""
    return ConfigError(
        "a share of the processor needs a cgroup that this process may write: cgroup v1's cpu, or cgroup v2 with the "
        "cpu controller, as root has on most machines; leave out --cpu, or run as root"
    )
