"""How a lab stands, by the kernel's own account."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.lab import cgroups, kernel, plan
from shoal.lab.cluster import Host, Lab
from shoal.lab.spec import Link

TOLERANCE = 0.1
"""A measured rate this much off what the limits allow is not that of the link that was asked for."""


def look(lab: Lab) -> list[dict[str, Any]]:
    """A row a host: name and address, the link asked for and the one that the kernel limits it to now, its delay, bytes
    sent and received, whether it is cut, how many processes it has and how many of them are frozen, its cores."""
    return [_row(lab, host) for host in lab.hosts]


def _row(lab: Lab, host: Host) -> dict[str, Any]:
    made, pids = lab.record.hosts[host.number], host.pids()
    sent, received = lab.bytes(host)
    return {
        "host": host.name,
        "address": host.address,
        "asked": made.link,
        "link": str(link_now(lab, host)),
        "delay_s": made.delay_s,
        "cores": cgroups.limited_to(Path(made.group)) if made.group else None,
        "sent_bytes": sent,
        "received_bytes": received,
        "is_cut": not kernel.is_up(plan.outer(lab.name, host.number)),
        "num_processes": len(pids),
        "num_frozen": sum(kernel.state(pid) == "T" for pid in pids),
    }


def link_now(lab: Lab, host: Host) -> Link:
    """The rates that the kernel limits a host's link to at this moment."""
    up = kernel.limit(host.namespace, plan.inner(lab.name, host.number))
    return Link(up, kernel.limit(None, plan.outer(lab.name, host.number)))


def verify(lab: Lab) -> list[dict[str, Any]]:
    """Each host sends to the next for a second: the rate measured, and the one that both links now allow a payload."""
    rows = []
    for host in lab.hosts:
        to = lab.hosts[(host.number + 1) % len(lab.hosts)]
        limits = [rate for rate in (link_now(lab, host).up, link_now(lab, to).down) if rate is not None]
        allowed = plan.expected_payload_rate(min(limits)) if limits else None
        measured = lab.measure(host, to)
        is_right = allowed is None or abs(measured / allowed - 1) <= TOLERANCE
        rows.append({"from": host.name, "to": to.name, "measured": measured, "allowed": allowed, "is_right": is_right})
    return rows
