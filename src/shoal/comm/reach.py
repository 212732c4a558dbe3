"""Who can be reached: plain connection attempts, all at once."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor


def own_address(towards: str) -> str:
    """The address of this host that traffic to ``towards`` (host:port) leaves from, which others reach it at."""
    host, port = towards.rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


def unreachable(addresses: Mapping[str, str], timeout_s: float) -> frozenset[str]:
    """The names whose address (host:port) does not take a connection within ``timeout_s``."""
    if not addresses:
        return frozenset()
    with ThreadPoolExecutor(len(addresses)) as pool:
        answers = pool.map(lambda item: (item[0], _answers(item[1], timeout_s)), addresses.items())
        return frozenset(name for name, ok in answers if not ok)


def _answers(address: str, timeout_s: float) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout_s):
            return True
    except OSError:
        return False
