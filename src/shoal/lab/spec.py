"""What a lab is asked to be: how many hosts, how fast their links, how far apart, with how much processor. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shoal.errors import ConfigError

MOST_HOSTS = 200
LONGEST_NAME = 10
"""Interfaces are named for the lab and a host, and the kernel takes names of 15 characters."""
LOWEST_RATE = 64_000
HIGHEST_RATE = 100_000_000_000
LONGEST_DELAY_S = 10.0
LEAST_CORES = 0.05

_RATE = re.compile(r"(\d+(?:\.\d+)?)(k|m|g)bit", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_NAME = re.compile(rf"[a-z][a-z0-9-]{{0,{LONGEST_NAME - 1}}}")
_POWERS = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

T = TypeVar("T")


def parse_rate(text: str) -> int:
    """``100mbit`` as bits a second. ``ConfigError`` for what is no rate, or one that no link here can have."""
    found = _RATE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"a rate is a number and kbit, mbit or gbit, such as 100mbit, not {text!r}")
    rate = round(float(found[1]) * _POWERS[found[2].lower()])
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise ConfigError(f"a rate must be from 64kbit to 100gbit, and {text!r} is not")
    return rate


def rate_text(rate: int | None) -> str:
    """The rate as ``parse_rate`` takes it, and ``none`` for a link that is not shaped."""
    if rate is None:
        return "none"
    unit, power = next(((u, p) for u, p in reversed(_POWERS.items()) if rate >= p), ("k", 1_000))
    return f"{rate / power:.10g}{unit}bit"


def parse_duration_s(text: str) -> float:
    """``20ms`` as seconds."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"a delay is a number and us, ms or s, such as 20ms, not {text!r}")
    duration_s = float(found[1]) * _SECONDS[found[2]]
    if duration_s > LONGEST_DELAY_S:
        raise ConfigError(f"a delay must be at most {LONGEST_DELAY_S:g}s, and {text!r} is not")
    return duration_s


def parse_cores(text: str) -> float:
    """``0.5`` as cores."""
    try:
        cores = float(text)
    except ValueError:
        cores = 0.0
    if not LEAST_CORES <= cores < float("inf"):
        raise ConfigError(f"a share of processor is a number of cores from {LEAST_CORES} on, such as 0.5, not {text!r}")
    return cores


@dataclass(frozen=True)
class Link:
    """A host's link, in bits a second: ``up`` is what it sends, ``down`` what it receives; None is not shaped."""

    up: int | None = None
    down: int | None = None

    @staticmethod
    def parse(text: str) -> Link:
        """``100mbit`` for both directions, ``10mbit/100mbit`` for up and down, ``none`` for a link without a limit."""
        up, slash, down = text.partition("/")
        first = _rate_or_none(up)
        return Link(first, _rate_or_none(down) if slash else first)

    def __str__(self) -> str:
        up, down = rate_text(self.up), rate_text(self.down)
        return up if up == down else f"{up}/{down}"


def _rate_or_none(text: str) -> int | None:
    return None if text.strip() == "none" else parse_rate(text)


@dataclass(frozen=True)
class HostSpec:
    """One host: its link, how much later what it sends arrives, and how many cores it may use (None: all)."""

    link: Link = Link()
    delay_s: float = 0.0
    cores: float | None = None


@dataclass(frozen=True, kw_only=True)
class LabSpec:
    """A lab to be made. Hosts are numbered from 0.

    ``link``, ``delay`` and ``cpu`` are one text for all hosts, or several, in which ``HOST=`` says whom one is for:
    ``["100mbit", "2=10mbit/50mbit"]`` is 100 Mbit/s for all, but host 2 sends 10 and receives 50. ``delay``: what a
    host sends arrives that much later, so that a round trip between two hosts takes twice that. ``cpu``: cores, such as
    0.5. ``name``: of at most 10 characters; one is made up if there is none. ``warm``: Python processes on the hosts
    are forks of one that has torch loaded, which saves each some seconds. ``ConfigError`` for what cannot be.
    """

    hosts: int
    link: str | Sequence[str] = "none"
    delay: str | Sequence[str] = "0ms"
    cpu: str | float | Sequence[str] = ()
    name: str | None = None
    warm: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= MOST_HOSTS:
            raise ConfigError(f"a lab has from 1 to {MOST_HOSTS} hosts, not {self.hosts}")
        if self.name is not None:
            check_name(self.name)
        self.each()

    def each(self) -> tuple[HostSpec, ...]:
        """The hosts, as they were asked for."""
        links = self._spread("link", self.link, Link.parse)
        delays = self._spread("delay", self.delay, parse_duration_s)
        cores = self._spread("cpu", self.cpu, parse_cores)
        plain = HostSpec()
        return tuple(
            HostSpec(links.get(n, plain.link), delays.get(n, plain.delay_s), cores.get(n, plain.cores))
            for n in range(self.hosts)
        )

    def _spread(self, what: str, given: str | float | Sequence[str], parse: Callable[[str], T]) -> dict[int, T]:
        """The value of each host that has one. A text for one host beats one for all, wherever it stands."""
        texts = [given] if isinstance(given, str) else [str(given)] if isinstance(given, int | float) else list(given)
        common = [text for text in texts if "=" not in text]
        if len(common) > 1:
            raise ConfigError(f"{what} was given {len(common)} times for all hosts: {', '.join(common)}; give it once")
        values = dict.fromkeys(range(self.hosts), parse(common[0])) if common else {}
        for text in texts:
            host, equals, value = text.partition("=")
            if equals:
                values[host_number(host, self.hosts)] = parse(value)
        return values


def check_name(name: str) -> None:
    """``ConfigError`` unless a lab can be called so."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"a lab's name has at most {LONGEST_NAME} lower-case letters, digits and dashes, and begins with a letter; "
            f"{name!r} does not fit"
        )


def host_number(text: str, num_hosts: int) -> int:
    """``2`` and ``h2`` are host 2. ``ConfigError`` if the lab has none such."""
    digits = text.strip().removeprefix("h")
    if not digits.isdecimal() or int(digits) >= num_hosts:
        raise ConfigError(f"the hosts are 0 to {num_hosts - 1} (or h0 to h{num_hosts - 1}), and none is {text!r}")
    return int(digits)
