"""Encrypted links for control messages: a listener that many call, and the call itself.

A socket belongs to the thread that uses it. Messages are msgspec structs; a message that does not decode is dropped
and counted, since whoever sent it holds the key and runs another revision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from shoal.comm.doorkeeper import Doorkeeper
from shoal.comm.keys import JobKey
from shoal.errors import ConfigError

M = TypeVar("M")

_LOW_DELAY = 0x10
_RECONNECT_MS = 50
_PING_MS = 1000


def bound_address(socket: zmq.Socket[bytes]) -> str:
    """The host:port that a socket listens on."""
    return bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode().removeprefix("tcp://")


def listening(socket: zmq.Socket[bytes], host: str, port: int) -> str:
    """Have a socket listen: where it does. ``ConfigError`` if it cannot."""
    try:
        socket.bind(f"tcp://{host}:{port}")
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; is it in use? choose another port") from error
    return bound_address(socket)


@dataclass(frozen=True)
class Inbound(Generic[M]):
    """A message and who sent it."""

    peer: str
    message: M


class Listener(Generic[M]):
    """Receive from many callers, answer each by name, and notice at once when a caller's connection ends.

    ``expect`` is the union of message types it takes. A port in use is a ``ConfigError``; port 0 picks a free one.
    """

    def __init__(self, host: str, port: int, key: JobKey, expect: type[M]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._doorkeeper = Doorkeeper(self._context, key)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 200
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.TOS, _LOW_DELAY)
        self._socket.setsockopt(zmq.SNDHWM, 100_000)
        self._socket.setsockopt(zmq.RCVHWM, 100_000)
        key.listen(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self.address = listening(self._socket, host, port)
        except ConfigError:
            self.close()
            raise
        self._decoder = msgspec.msgpack.Decoder(expect)
        self._encoder = msgspec.msgpack.Encoder()
        self._peer_of: dict[int, str] = {}
        self._peers_before: dict[int, list[str]] = {}
        self.num_undecodable = 0
        self.num_refused = 0
        """How many connections ended before a word came that the job's key opens. A stranger may try many times."""

    def receive(self, timeout_s: float) -> tuple[list[Inbound[M]], list[str]]:
        """What came, and whose connections ended, waiting at most ``timeout_s`` for the first of either."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.poll(max(0, int(timeout_s * 1000)))
        # Messages that came before a connection ended are seen before its end.
        closed = self._closed()
        came: list[Inbound[M]] = []
        while self._socket.poll(0):
            inbound = self._receive_one()
            if inbound is not None:
                came.append(inbound)
        return came, [peer for peer in map(self._forget, closed) if peer is not None]

    def _receive_one(self) -> Inbound[M] | None:
        frames = self._socket.recv_multipart(copy=False)
        peer = bytes(frames[0].buffer).decode(errors="replace")
        self._note(int(frames[-1].get(zmq.SRCFD)), peer)
        try:
            return Inbound(peer, self._decoder.decode(frames[-1].buffer))
        except msgspec.MsgspecError:
            self.num_undecodable += 1
            return None

    def _note(self, fd: int, peer: str) -> None:
        """Whose connection this is. A descriptor may be used anew before we have read that its last one ended."""
        before = self._peer_of.get(fd)
        if before is not None and before != peer:
            self._peers_before.setdefault(fd, []).append(before)
        self._peer_of[fd] = peer

    def _closed(self) -> list[int]:
        """The descriptors of connections that ended."""
        closed = []
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())
            closed.append(int(event["value"]))
        return closed

    def _forget(self, fd: int) -> str | None:
        """Whose connection it was; None, and counted, for one that was refused."""
        before = self._peers_before.get(fd)
        peer = before.pop(0) if before else self._peer_of.pop(fd, None)
        self.num_refused += peer is None
        return peer

    def send(self, peer: str, message: object) -> None:
        """Queue a message; one for a caller that is gone is dropped."""
        self._socket.send_multipart([peer.encode(), self._encoder.encode(message)])

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._doorkeeper.close()
        self._context.term()


class Link(Generic[M]):
    """Call a listener, and keep calling: it reconnects by itself, and what was sent meanwhile is kept."""

    def __init__(self, address: str, key: JobKey, name: str, expect: type[M]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 500
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _PING_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 5 * _PING_MS)
        self._socket.setsockopt(zmq.TOS, _LOW_DELAY)
        key.call(self._socket)
        try:
            self._socket.connect(f"tcp://{address}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot call {address!r}: {error}; an address reads HOST:PORT") from error
        self._decoder = msgspec.msgpack.Decoder(expect)
        self._encoder = msgspec.msgpack.Encoder()
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://wake")
        self.num_undecodable = 0

    def waker(self) -> Waker:
        """A handle with which one other thread ends a ``receive`` early."""
        return Waker(self._context)

    def send(self, message: object) -> None:
        """Queue a message. While nobody answers, the first thousand are kept and later ones are dropped."""
        try:
            self._socket.send(self._encoder.encode(message), zmq.DONTWAIT)
        except zmq.Again:
            return

    def receive(self, timeout_s: float, wake_fd: int | None = None) -> list[M]:
        """What came, waiting at most ``timeout_s`` for the first, less when woken or when ``wake_fd`` can be read."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        if wake_fd is not None:
            poller.register(wake_fd, zmq.POLLIN)
        ready = dict(poller.poll(max(0, int(timeout_s * 1000))))
        if self._wake in ready:
            while self._wake.poll(0):
                self._wake.recv()
        came: list[M] = []
        while self._socket.poll(0):
            try:
                came.append(self._decoder.decode(self._socket.recv()))
            except msgspec.MsgspecError:
                self.num_undecodable += 1
        return came

    def close(self) -> None:
        self._wake.close(linger=0)
        self._socket.close()
        self._context.term()


class Waker:
    """Wakes a ``Link`` that waits. Close it before the link."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._socket = context.socket(zmq.PAIR)
        self._socket.connect("inproc://wake")

    def wake(self) -> None:
        try:
            self._socket.send(b"", zmq.DONTWAIT)
        except zmq.Again:
            return

    def close(self) -> None:
        self._socket.close(linger=0)
