"""TLS in memory for one connection: each side shows that it holds the key, and what they say then is encrypted.

Unless it never leaves a kernel. Two ends of one connection may find that they are that, and in one network namespace of
one running kernel. They tell each other so within TLS; if both say the same, what follows is in the clear: only who may
capture or forge packets in that namespace could read or alter it. A relay, a tunnel and a translated address make it
differ.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.comm.keys import JobKey
from shoal.errors import ConfigError

_BOOT, _NETWORK = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/net"
_PLACE_BYTES = hashlib.sha256().digest_size
_SWITCH = "SHOAL_ENCRYPT"


def place_of(sock: socket.socket, *, calls: bool) -> bytes | None:
    """What both ends of a connection find that does not leave this kernel: a hash of which kernel, network namespace
    and connection it is. None if this end's address is not the other's, or where the system does not tell. Of IPv6 only
    the loopback: a packet that claims to come from another of this machine's addresses may come from outside."""
    with suppress(OSError):
        here, there = sock.getsockname(), sock.getpeername()
        if here[0] == there[0] and (sock.family == socket.AF_INET or here[0] == "::1"):
            ends = (here, there) if calls else (there, here)
            kernel = _BOOT.read_text().strip(), os.stat(_NETWORK).st_ino
            return hashlib.sha256(repr((kernel, ends)).encode()).digest()
    return None


@dataclass(frozen=True)
class Sealer:
    """What seals the connections of one side. ``near`` None: all that is said is to be encrypted."""

    far: ssl.SSLContext
    near: ssl.SSLContext | None
    calls: bool

    @staticmethod
    def of(key: JobKey, *, calls: bool) -> Sealer:
        """For the side that ``calls``, or is called. ``ConfigError`` if the environment's ``SHOAL_ENCRYPT`` is neither
        ``always`` nor empty."""
        switch = os.environ.get(_SWITCH, "")
        if switch not in ("", "always"):
            raise ConfigError(
                f"{_SWITCH} may be always, to encrypt within a machine, too, or not set; it is {switch!r}"
            )
        near = key.tls(serves=not calls, near=True) if not switch else None
        return Sealer(key.tls(serves=not calls), near, calls)


class Seal:
    """Of a connection that is there. Memory lies between it and the socket, so that the system is asked once for many
    of TLS's records of 16 KB."""

    def __init__(self, sealer: Sealer, sock: socket.socket) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._place = b""
        context = sealer.far
        if sealer.near is not None and (place := place_of(sock, calls=sealer.calls)) is not None:
            self._place, context = place, sealer.near
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=not sealer.calls)
        self._is_known = False
        self.is_needed = True
        """Whether what follows is to be encrypted, once both sides are known to each other."""

    def shake_hands(self) -> bool:
        """As far as it goes; whether both sides are known to each other."""
        try:
            if not self._is_known:
                self._object.do_handshake()
                self._is_known = True
                if self._may_be_near:
                    self._object.write(self._place)
            if self._may_be_near:
                self.is_needed = self._object.read(_PLACE_BYTES) != self._place
        except ssl.SSLWantReadError:
            return False
        return True

    @property
    def _may_be_near(self) -> bool:
        """Whether both have a place to tell."""
        return self._object.selected_alpn_protocol() is not None

    def take_from(self, sock: socket.socket, room: memoryview) -> int:
        """Whatever has come, by way of ``room``: how much."""
        num = sock.recv_into(room)
        self._incoming.write(room[:num])
        return num

    def read_into(self, room: memoryview) -> int:
        """Decrypt, at most a record: how much, 0 if more must come first."""
        if not (self._incoming.pending or self._object.pending()):
            return 0  # as the next lines would find, after a while
        try:
            return int(self._object.read(len(room), room))
        except ssl.SSLWantReadError:
            return 0

    def encrypted(self, data: memoryview) -> memoryview:
        """``data``, with what else TLS has to say."""
        if len(data):
            self._object.write(data)
        return memoryview(self._outgoing.read())

    def unread(self) -> memoryview:
        """What has come after all of TLS."""
        return memoryview(self._incoming.read())
