"""A process group's own TCP sockets, found among all that the process has open.

Gloo offers no way to end a collective that hangs on a frozen peer or a cut link. Shutting its connected sockets down
makes the collective raise at once. They are told from every other socket by address: one end of each is a gloo
listener, either our own or a peer's. Listeners are never touched, for that would end the process. Linux only; elsewhere
a hung collective ends by its time-out.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

Address = tuple[str, int]
T = TypeVar("T")

_FDS = "/proc/self/fd"
_TCP_INFO_BYTES = 256
_BYTES_ACKED_AT = 120
_BUSY_AT = 168
"""Offsets in Linux's struct tcp_info."""


@dataclass(frozen=True)
class TcpSocket:
    """A descriptor of this process that is a TCP socket; ``remote`` is None for a listener."""

    fd: int
    local: Address
    remote: Address | None
    listens: bool


def can_find_sockets() -> bool:
    """Whether this system tells a process what it has open."""
    return os.path.isdir(_FDS)


def tcp_sockets() -> list[TcpSocket]:
    """Every TCP socket that this process has open; none where the system does not tell."""
    if not can_find_sockets():
        return []
    found = [_describe(int(name)) for name in os.listdir(_FDS)]
    return [entry for entry in found if entry is not None]


def _describe(fd: int) -> TcpSocket | None:
    with suppress(OSError):
        if os.readlink(f"{_FDS}/{fd}").startswith("socket:"):
            return _with_socket(fd, lambda handle: _describe_socket(fd, handle))
    return None


def _describe_socket(fd: int, handle: socket.socket) -> TcpSocket | None:
    if handle.family not in (socket.AF_INET, socket.AF_INET6) or handle.type != socket.SOCK_STREAM:
        return None
    listens = bool(handle.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    remote = None if listens else handle.getpeername()[:2]
    return TcpSocket(fd, handle.getsockname()[:2], remote, listens)


def _with_socket(fd: int, use: Callable[[socket.socket], T]) -> T:
    """Use a descriptor as a socket without owning it."""
    with socket.socket(fileno=os.dup(fd)) as handle:
        return use(handle)


def belongs(entry: TcpSocket, listeners: frozenset[Address]) -> bool:
    """Whether a connected socket has one of these listeners at either end."""
    return not entry.listens and (entry.local in listeners or entry.remote in listeners)


def shut_down(entries: list[TcpSocket]) -> None:
    """End connected sockets for both sides, from any thread; one that is closed meanwhile is passed over."""
    for entry in entries:
        assert not entry.listens
        with suppress(OSError):
            _with_socket(entry.fd, partial(_end, entry))


def _end(entry: TcpSocket, handle: socket.socket) -> None:
    """The descriptor may have been closed and opened anew since it was described."""
    if (handle.getsockname()[:2], handle.getpeername()[:2]) == (entry.local, entry.remote):
        handle.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Traffic:
    """What connections have carried, as the kernel counted it: bytes sent (and acknowledged) and received, and the
    seconds in which data was under way, summed over the connections."""

    sent_bytes: int = 0
    received_bytes: int = 0
    busy_s: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        received, busy_s = self.received_bytes + other.received_bytes, self.busy_s + other.busy_s
        return Traffic(self.sent_bytes + other.sent_bytes, received, busy_s)


def traffic(entries: list[TcpSocket]) -> Traffic:
    """What these connections have carried so far; one that is closed meanwhile is passed over."""
    total = Traffic()
    for entry in entries:
        with suppress(OSError, struct.error):
            info = _with_socket(
                entry.fd, lambda handle: handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
            )
            sent, received = struct.unpack_from("=QQ", info, _BYTES_ACKED_AT)
            (busy_us,) = struct.unpack_from("=Q", info, _BUSY_AT)
            total += Traffic(sent, received, busy_us / 1e6)
    return total
