"""Three hosts in network namespaces, and a link between two of them that is cut."""

from __future__ import annotations

import ctypes
import os
import subprocess
import uuid
from typing import Any

import pytest

from shoal.errors import Fault
from tests.comm.crew import Crew, _run
from tests.comm.test_collectives import reduce_until_aborted

pytestmark = pytest.mark.cluster
_CLONE_NEWNET = 0x40000000


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def enter(namespace: str) -> None:
    """Move this process there."""
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    assert ctypes.CDLL(None, use_errno=True).setns(handle, _CLONE_NEWNET) == 0
    os.close(handle)


def run_in(namespaces: list[str], rank: int, *rest: Any) -> None:
    enter(namespaces[rank])
    _run(rank, *rest)


class Launch:
    """``Crew``'s way to start a member in its own namespace."""

    def __init__(self, namespaces: list[str]) -> None:
        self._namespaces = namespaces

    def __call__(self, *args: Any) -> None:
        run_in(self._namespaces, *args)


@pytest.fixture(name="hosts")
def _hosts():
    """Names of three namespaces on one bridge, with the addresses 10.213.0.1 to 3."""
    tag = uuid.uuid4().hex[:6]
    names, bridge = [f"shoal-{tag}-{i}" for i in range(3)], f"br{tag}"
    try:
        ip("link", "add", bridge, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need the right to make links: {error}")
    try:
        ip("link", "set", bridge, "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"v{tag}{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"v{tag}{i}", "master", bridge, "up")
            ip("-n", name, "address", "add", f"10.213.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        ip("link", "delete", bridge)


def cut(names: list[str], one: int, other: int) -> None:
    """Drop everything between two hosts, without a word to either."""
    for here, there in ((one, other), (other, one)):
        ip("-n", names[here], "route", "add", "blackhole", f"10.213.0.{there + 1}/32")
        ip("-n", names[here], "route", "flush", "cache")


def test_an_abort_ends_a_collective_across_a_cut_link(hosts):
    addresses = [f"10.213.0.{rank + 1}" for rank in range(3)]
    with Crew(3, reduce_until_aborted, addresses, Launch(hosts)) as crew:
        for rank in range(3):
            crew.says(rank, "formed")
            crew.says(rank, "reducing")
        cut(hosts, 0, 1)
        for rank in range(3):
            crew.lines[rank].send("abort")
        assert all(isinstance(crew.says(rank, "returned"), Fault) for rank in range(3))
