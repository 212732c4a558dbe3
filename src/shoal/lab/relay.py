"""A link with a delay, where the kernel has no netem: a process that carries frames from one end to the other.

``python -m shoal.lab.relay NAMESPACE INNER OUTER DELAY_S`` makes both ends as TAP devices, says ``ready``, and carries
until it is killed; the ends go with it. What enters at the inner end comes out after the delay, what enters at the
outer end at once.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from shoal.errors import ConfigError, ShoalError
from shoal.lab.kernel import namespace_path

_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000
_CLONE_NEWNET = 0x40000000
_FRAME_BYTES = 65_536
_MOST_WAITING_BYTES = 64 << 20
_AT_ONCE = 64


@dataclass
class Held:
    """Frames that are on their way, oldest first. Beyond 64 MiB new ones are lost, as on a real link."""

    delay_s: float
    frames: deque[tuple[float, bytes]] = field(default_factory=deque)
    num_bytes: int = 0

    def put(self, frame: bytes, now_s: float) -> None:
        """A frame that comes in now."""
        if self.num_bytes + len(frame) <= _MOST_WAITING_BYTES:
            self.frames.append((now_s + self.delay_s, frame))
            self.num_bytes += len(frame)

    def due(self, now_s: float) -> bytes | None:
        """The next frame that has been on its way for long enough."""
        if not self.frames or self.frames[0][0] > now_s:
            return None
        frame = self.frames.popleft()[1]
        self.num_bytes -= len(frame)
        return frame

    def wait_s(self, now_s: float) -> float | None:
        """How long until one is due; None if there is none."""
        return max(0.0, self.frames[0][0] - now_s) if self.frames else None


def _tap(name: str) -> int:
    """A TAP device, which lives as long as its descriptor."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    except OSError as error:
        raise ConfigError(
            f"a delay needs netem, which this kernel has not, or else the right to use /dev/net/tun: {error.strerror}"
        ) from None
    return fd


def _tap_in(space: str, name: str) -> int:
    """A TAP device in a namespace. This process stays where it is, so as not to be killed with the host's."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/ns/net", "rb") as home, namespace_path(space).open("rb") as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise ConfigError(f"{space} cannot be entered: {os.strerror(ctypes.get_errno())}")
        try:
            return _tap(name)
        finally:
            libc.setns(home.fileno(), _CLONE_NEWNET)


def _frames(fd: int) -> list[bytes]:
    frames: list[bytes] = []
    try:
        while len(frames) < _AT_ONCE:
            frames.append(os.read(fd, _FRAME_BYTES))
    except OSError:
        pass  # no more of them, or the end is down
    return frames


def _send(fd: int, frame: bytes) -> None:
    try:
        os.write(fd, frame)
    except OSError:
        return  # the end is down: the link is cut


def carry(inner: int, outer: int, held: Held) -> None:
    """For ever."""
    while True:
        ready, _, _ = select.select([inner, outer], [], [], held.wait_s(time.monotonic()))
        if outer in ready:
            for frame in _frames(outer):
                _send(inner, frame)
        if inner in ready:
            now_s = time.monotonic()
            for frame in _frames(inner):
                held.put(frame, now_s)
        now_s = time.monotonic()
        while frame_due := held.due(now_s):
            _send(outer, frame_due)


def main() -> None:
    space, inner, outer, delay_s = sys.argv[1:]
    try:
        ends = _tap_in(space, inner), _tap(outer)
    except ShoalError as error:
        print(error.message, flush=True)
        sys.exit(error.exit_code)
    print("ready", flush=True)
    carry(*ends, Held(float(delay_s)))


if __name__ == "__main__":
    main()
