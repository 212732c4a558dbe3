"""Where a worker's time goes: what heartbeats, the event log and ``shoal status`` tell of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.comm.collectives import Group
from shoal.comm.exchange import Times
from shoal.comm.sockets import Traffic

_WINDOW_S = 0.5


class Meter:
    """Averages over windows of half a second or a round, whichever is longer. One worker in one generation.

    A step is made of ``compute_s`` (forward, backward, optimizer), ``encode_s`` and ``decode_s`` (a codec's work),
    ``wire_s`` (blocked while its own connections had data under way, as the kernel counts it) and ``wait_s`` (blocked
    otherwise: for others). ``link_s`` is how long a connection of its had data under way, on average over the peers,
    hidden or not: it is long on a host with a slow link.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._begun_s = time.perf_counter()
        self._compute_s = 0.0
        self._num_samples = 0
        self._num_steps = 0
        self._traffic = group.traffic() or Traffic()

    @contextmanager
    def computing(self, num_samples: int, times: Times) -> Iterator[None]:
        """Within this the worker computes on so many samples; what ``times`` counts meanwhile is not computing."""
        begun_s, before_s = time.perf_counter(), times.total_s
        yield
        self._compute_s += time.perf_counter() - begun_s - (times.total_s - before_s)
        self._num_samples += num_samples

    def committed(self, num_steps: int, times: Times) -> dict[str, float]:
        """So many steps more are committed: figures a step, if a window has ended."""
        self._num_steps += num_steps
        now_s = time.perf_counter()
        if now_s - self._begun_s < _WINDOW_S:
            return {}
        spent, traffic = times.take(), self._group.traffic() or Traffic()
        n = self._num_steps
        link_s = (traffic.busy_s - self._traffic.busy_s) / max(1, self._group.seat.world_size - 1)
        wire_s = min(spent.wait_s, link_s)
        figures = {
            "compute_s": self._compute_s / n,
            "samples": self._num_samples / n,
            "step_s": (now_s - self._begun_s) / n,
            "encode_s": spent.encode_s / n,
            "wire_s": wire_s / n,
            "wait_s": (spent.wait_s - wire_s) / n,
            "decode_s": spent.decode_s / n,
            "link_s": link_s / n,
            "sent_bytes": (traffic.sent_bytes - self._traffic.sent_bytes) / n,
            "received_bytes": (traffic.received_bytes - self._traffic.received_bytes) / n,
        }
        self._begun_s, self._compute_s, self._num_samples, self._num_steps = now_s, 0.0, 0, 0
        self._traffic = traffic
        return figures
