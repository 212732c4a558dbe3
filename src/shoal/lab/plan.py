"""How a lab is made, changed and unmade, as the commands that do it. Pure: nothing is run here."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from shoal.errors import ConfigError
from shoal.lab.spec import Link

Command = tuple[str, ...]
"""The words of a command."""

FIRST_HOST = 10
"""The last part of host 0's address. The bridge, which the machine itself is reached at, has 1."""

QUEUE_S = 0.1
"""A packet that would wait longer than this for its link is dropped."""

_BURST_S = 0.0064
_LEAST_BURST_BYTES = 4_096
_ETHERNET_BYTES = 1_514


def namespace(lab: str, host: int) -> str:
    """The network namespace that is the host."""
    return f"{lab}h{host}"


def bridge(lab: str) -> str:
    """The interface that all hosts' links end at, and that has this machine's address."""
    return f"{lab}b"


def inner(lab: str, host: int) -> str:
    """The host's own interface: what leaves it is what the host sends."""
    return f"{lab}i{host}"


def outer(lab: str, host: int) -> str:
    """The other end of the host's link, at the bridge: what leaves it is what the host receives."""
    return f"{lab}o{host}"


def address(subnet: str, host: int) -> str:
    """The host's address in ``subnet``, such as 10.83.0.0/24."""
    return str(ipaddress.ip_network(subnet)[FIRST_HOST + host])


def bridge_address(subnet: str) -> str:
    """This machine's address in the lab."""
    return str(ipaddress.ip_network(subnet)[1])


def free_subnet(used: Iterable[str]) -> str:
    """A /24 of private addresses that overlaps none of ``used``, the machine's routes and addresses."""
    taken = [ipaddress.IPv4Network(text, strict=False) for text in used]
    for candidate in _candidates():
        if not any(candidate.overlaps(network) for network in taken):
            return str(candidate)
    raise ConfigError("a lab needs a free /24 among 10.83.*, 172.29.* and 192.168.*, and routes lead to all of them")


def _candidates() -> Iterator[ipaddress.IPv4Network]:
    for prefix in ("10.83", "172.29", "192.168"):
        yield from (ipaddress.IPv4Network(f"{prefix}.{third}.0/24") for third in range(256))


def make_bridge(lab: str, subnet: str) -> list[Command]:
    """The bridge, and the machine's own address on it."""
    name = bridge(lab)
    return [
        ("ip", "link", "add", "name", name, "type", "bridge"),
        ("ip", "addr", "add", f"{bridge_address(subnet)}/24", "dev", name),
        ("ip", "link", "set", "dev", name, "up"),
    ]


def make_namespace(lab: str, host: int) -> list[Command]:
    """A host that has only its loopback."""
    space = namespace(lab, host)
    return [("ip", "netns", "add", space), ("ip", "-n", space, "link", "set", "dev", "lo", "up")]


def make_link(lab: str, host: int) -> list[Command]:
    """Both ends of a host's link: a pair of interfaces, each the other's wire."""
    near, far, space = inner(lab, host), outer(lab, host), namespace(lab, host)
    return [
        ("ip", "link", "add", "name", far, "type", "veth", "peer", "name", near),
        ("ip", "link", "set", "dev", near, "netns", space),
    ]


def connect(lab: str, host: int, subnet: str) -> list[Command]:
    """Put the far end on the bridge, and give the near end the host's address."""
    near, far, space = inner(lab, host), outer(lab, host), namespace(lab, host)
    return [
        ("ip", "link", "set", "dev", far, "master", bridge(lab), "up"),
        ("ip", "-n", space, "addr", "add", f"{address(subnet, host)}/24", "dev", near),
        ("ip", "-n", space, "link", "set", "dev", near, "up"),
    ]


def choose_cubic(lab: str, num_hosts: int, subnet: str) -> list[Command]:
    """Cubic for every connection within the lab, whatever the machine's default is; the route says so, since a
    namespace may not choose what the machine does not allow to all."""
    words = ("route", "replace", subnet, "proto", "kernel", "scope", "link")
    ends: list[tuple[Command, str, str]] = [(("ip",), bridge(lab), bridge_address(subnet))]
    ends += [(("ip", "-n", namespace(lab, n)), inner(lab, n), address(subnet, n)) for n in range(num_hosts)]
    return [(*ip, *words, "src", own, "dev", dev, "congctl", "cubic") for ip, dev, own in ends]


def shape(lab: str, host: int, link: Link) -> list[Command]:
    """Limit both directions, each where it leaves; or lift the limit. Also a link's that has another one already."""
    space = ("-n", namespace(lab, host))
    return [_limit(space, inner(lab, host), link.up), _limit((), outer(lab, host), link.down)]


def _limit(where: Command, dev: str, rate: int | None) -> Command:
    if rate is None:
        return ("tc", *where, "qdisc", "replace", "dev", dev, "root", "pfifo", "limit", "1000")
    burst = f"burst {burst_bytes(rate)} latency {QUEUE_S * 1000:g}ms"
    return ("tc", *where, "qdisc", "replace", "dev", dev, "root", "handle", handle(rate), "tbf", "rate", f"{rate}bit",
            *burst.split())  # fmt: skip


def handle(rate: int) -> str:
    """A name for a limit, another one for another rate: so the kernel makes a new queue, and packets that are too large
    for the new burst are not left in the old one for good."""
    return f"{1 + rate // 1000 % 0xFFFE:x}:"


def burst_bytes(rate: int) -> int:
    """What a link that was idle may send at once: 6.4 ms' worth. It outlasts the kernel's timers, and at 100 Mbit/s
    holds the 64 KiB that TCP hands down as one: with less the kernel cuts each of those up in software. More would
    carry whole messages for nothing, small ones above all, and flatter who sends little."""
    return max(_LEAST_BURST_BYTES, round(rate * _BURST_S / 8))


def hold(lab: str, host: int, delay_s: float, up: int | None) -> Command:
    """Have the kernel keep what the host sends for ``delay_s``, behind the limit to that, ``up``, if it has one.

    Needs netem.
    """
    parent = ("root",) if up is None else ("parent", f"{handle(up)}1")
    return ("tc", "-n", namespace(lab, host), "qdisc", "replace", "dev", inner(lab, host), *parent,
            "netem", "delay", f"{delay_s * 1e6:.0f}us", "limit", "100000")  # fmt: skip


def cut(lab: str, host: int) -> Command:
    """No packet passes the host's link."""
    return ("ip", "link", "set", "dev", outer(lab, host), "down")


def heal(lab: str, host: int) -> Command:
    """Packets pass again."""
    return ("ip", "link", "set", "dev", outer(lab, host), "up")


def part(lab: str, host: int, *, on: bool) -> Command:
    """Hosts that are set apart do not reach each other, and reach all else."""
    return ("ip", "link", "set", "dev", outer(lab, host), "type", "bridge_slave", "isolated", "on" if on else "off")


def unmake(lab: str, num_hosts: int) -> list[Command]:
    """Everything that the above may have made. What is not there is to be passed over."""
    links = [("ip", "link", "del", "dev", outer(lab, n)) for n in range(num_hosts)]
    spaces = [("ip", "netns", "del", namespace(lab, n)) for n in range(num_hosts)]
    return [*links, *spaces, ("ip", "link", "del", "dev", bridge(lab))]


def expected_payload_rate(rate: int) -> float:
    """Of a link's bits, those that TCP leaves to its user: 1,448 of a full frame's 1,514 bytes."""
    return rate * 1_448 / _ETHERNET_BYTES
