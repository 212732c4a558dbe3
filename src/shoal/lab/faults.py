"""Faults of a lab's hosts, as values: read from a file with times, or given one by one. Pure."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import ConfigError
from shoal.lab.spec import Link, host_number, parse_cores

DEEDS = ("cut", "heal", "slow", "kill", "freeze", "thaw", "cpu")
"""What can be done to a host. ``slow`` and ``cpu`` take a value, and go back to what was asked for without one."""

_WITH_VALUE = ("slow", "cpu")


@dataclass(frozen=True, kw_only=True)
class HostFault:
    """``do`` to ``host``, ``at_s`` seconds after the command has begun. ``to``: slow's link, such as 10mbit, or cpu's
    cores, such as 0.33."""

    do: str
    host: int
    to: str | None = None
    at_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.do} h{self.host}{f' to {self.to}' if self.to else ''}"


def one_fault(do: str, host: str, to: str | None, num_hosts: int, at_s: float = 0.0) -> HostFault:
    """A fault from its words. ``ConfigError`` for what a lab of so many hosts cannot suffer."""
    if do not in DEEDS:
        raise ConfigError(f"a fault is one of {', '.join(DEEDS)}, not {do!r}")
    if to is not None and do not in _WITH_VALUE:
        raise ConfigError(f"{do} takes a host and no more, not {to!r}")
    if to is not None:
        Link.parse(to) if do == "slow" else parse_cores(to)
    return HostFault(do=do, host=host_number(host, num_hosts), to=to, at_s=at_s)


def parse_faults(text: str, num_hosts: int) -> tuple[HostFault, ...]:
    """The faults of a TOML text, by time:

        [[fault]]
        at_s = 3.0
        host = 2
        do = "slow"
        to = "10mbit"

    ``ConfigError`` says which fault is wrong, and how.
    """
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"faults are written in TOML, and this is none: {error}") from None
    entries = read.get("fault", [])
    if set(read) - {"fault"} or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"faults are [[fault]] tables, each with at_s, host and do; there is {', '.join(read)}")
    faults = [_fault(number, entry, num_hosts) for number, entry in enumerate(entries, 1)]
    return tuple(sorted(faults, key=lambda fault: fault.at_s))


def _fault(number: int, entry: Mapping[str, Any], num_hosts: int) -> HostFault:
    wrong = sorted(set(entry) - {"at_s", "host", "do", "to"}) + sorted({"at_s", "host", "do"} - set(entry))
    if wrong:
        raise ConfigError(f"fault {number} must have at_s, host and do, and may have to; look at {', '.join(wrong)}")
    at_s = entry["at_s"]
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not (math.isfinite(at_s) and at_s >= 0):
        raise ConfigError(f"fault {number}: at_s is seconds from the command's start, such as 3.0, not {at_s!r}")
    to = str(entry["to"]) if "to" in entry else None
    try:
        return one_fault(str(entry["do"]), str(entry["host"]), to, num_hosts, float(at_s))
    except ConfigError as error:
        raise ConfigError(f"fault {number}: {error.message}") from None
