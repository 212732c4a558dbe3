"""The worker's side of the control link, on a thread of its own, so that heartbeats go on whatever the loop does."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.clock import Clock, SystemClock
from shoal.comm import messages as msg
from shoal.comm.collectives import Group
from shoal.comm.keys import JobKey
from shoal.comm.link import Link
from shoal.comm.meeting import Meeting
from shoal.comm.reach import unreachable
from shoal.membership import NOTHING, Standing

_BEAT_S = 0.1
_HELLO_AGAIN_S = 2.0
_PROBE_S = 1.0

Order = msg.Pause | msg.Deal
Summons = msg.Enter | msg.Dismissed | msg.Ended


@dataclass
class Progress:
    """What heartbeats tell. Written by the loop, read by the agent."""

    step: int = -1
    stable_step: int = -1
    phase: str = "start"
    since_s: float = 0.0
    figures: dict[str, float] | None = None


class Agent:
    """Speaks for a worker. The loop calls its methods; the thread answers the coordinator.

    ``next_summons`` is what the loop waits for between generations; ``order`` what it looks at during one.
    """

    def __init__(self, address: str, key: JobKey, name: str, identity: msg.Identity) -> None:
        self.name = name
        self.order: Order | None = None
        self.ended = False
        self._clock: Clock = SystemClock()
        self._identity = identity
        self._progress = Progress()
        self._link: Link[Any] = Link(address, key, name, msg.ToWorker)  # type: ignore[arg-type]
        self._waker = self._link.waker()
        self._outbox: deque[object] = deque()
        self._summons: queue.SimpleQueue[Summons] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._generation = 0
        self._halted = True
        self._asked_to_report: int = 0
        self._report: msg.Report | None = None
        self._group: Group | None = None
        self._meeting: Meeting | None = None
        self._peers: Mapping[str, str] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shoal-agent", daemon=True)

    # For the loop

    def start(self) -> None:
        self._thread.start()

    def send(self, message: object) -> None:
        """Queue a message, from any thread."""
        self._outbox.append(message)
        with self._lock:
            if not self._closing.is_set():
                self._waker.wake()

    def note(self, kind: str, **fields: Any) -> None:
        """An event for the run's log."""
        self.send(msg.Note(event={"kind": kind, **fields}))

    def next_summons(self) -> Summons:
        """Wait for the next generation, or the end."""
        return self._summons.get()

    def enter(self, enter: msg.Enter) -> Meeting:
        """The loop takes its place in this generation; where its members meet."""
        with self._lock:
            assert self._meeting is not None and self._meeting.generation == enter.world.generation
            self._halted = False
            return self._meeting

    def watch_over(self, group: Group) -> None:
        """Abort ``group`` when this generation is halted, at once if it has been."""
        with self._lock:
            self._group = group
            if self._asked_to_report >= group.seat.generation or self._generation > group.seat.generation:
                group.abort()

    def report(self, generation: int, standing: Standing, cut: frozenset[str], reason: str) -> None:
        """The loop has stopped; tell what it holds."""
        with self._lock:
            number = max(generation, self._asked_to_report)
            self._report = msg.Report(
                generation=number, standing=standing, unreachable=sorted(cut), reason=reason
            )
            self._halted, self._group, self.order = True, None, None
        self.send(self._report)

    def at(self, phase: str, step: int | None = None, stable_step: int | None = None, **figures: float) -> None:
        """What the loop does from now on, for heartbeats."""
        progress = self._progress
        progress.phase, progress.since_s = phase, self._clock.monotonic_s()
        progress.step = progress.step if step is None else step
        progress.stable_step = progress.stable_step if stable_step is None else stable_step
        if figures:
            progress.figures = figures

    def close(self) -> None:
        """Send what is queued and end the thread."""
        with self._lock:
            self._waker.wake()
            self._closing.set()
        self._thread.join()
        self._waker.close()
        self._link.close()

    # The thread

    def _run(self) -> None:
        beat_at_s = hello_at_s = -1.0
        while not (self._closing.is_set() and not self._outbox):
            now_s = self._clock.monotonic_s()
            if self._generation == 0 and now_s >= hello_at_s:
                self._say_hello()
                hello_at_s = self._clock.monotonic_s() + _HELLO_AGAIN_S
            if now_s >= beat_at_s:
                self._beat(now_s)
                beat_at_s = now_s + _BEAT_S
            while self._outbox:
                self._link.send(self._outbox.popleft())
            for message in self._link.receive(max(0.0, beat_at_s - self._clock.monotonic_s())):
                self._handle(message)

    def _say_hello(self) -> None:
        cut = unreachable(self._peers, _PROBE_S)
        self._link.send(msg.Hello(identity=self._identity, unreachable=sorted(cut)))

    def _beat(self, now_s: float) -> None:
        at = self._progress
        self._link.send(
            msg.Beat(
                generation=self._generation,
                step=at.step,
                stable_step=at.stable_step,
                phase=at.phase,
                phase_s=now_s - at.since_s,
                figures=at.figures or {},
            )
        )

    def _handle(self, message: Any) -> None:
        match message:
            case msg.Welcome():
                self._peers = {w: a for w, a in message.peers.items() if w != self.name}
            case msg.WhoAreYou():
                self._introduce_again()
            case msg.Enter():
                self._summon(message)
            case msg.Meet():
                if self._meeting is not None and self._meeting.generation == message.generation:
                    self._meeting.deliver(message.key, message.value)
            case msg.Pause():
                self._pause(message)
            case msg.Deal():
                if message.generation == self._generation:
                    self.order = message
            case msg.Dismissed() | msg.Ended():
                self.ended = True
                self._summons.put(message)
                with self._lock:
                    self._stop_group()

    def _introduce_again(self) -> None:
        """A replaced coordinator asks who we are."""
        if self._generation == 0:
            self._link.send(msg.Hello(identity=self._identity))
            return
        with self._lock:
            standing = self._report.standing if self._halted and self._report else Standing(self._progress.step)
            halted = self._halted and self._report is not None
        self._link.send(
            msg.Attach(identity=self._identity, generation=self._generation, standing=standing, halted=halted)
        )

    def _summon(self, enter: msg.Enter) -> None:
        generation = enter.world.generation
        if generation <= self._generation:
            return
        publish: Callable[[str, bytes], None] = lambda key, value: self.send(  # noqa: E731
            msg.Meet(generation=generation, key=key, value=value)
        )
        with self._lock:
            self._stop_group()
            self._generation, self.order = generation, None
            self._meeting = Meeting(generation, publish, timeout_s=_MEET_S)
        self._summons.put(enter)

    def _pause(self, pause: msg.Pause) -> None:
        if pause.generation < self._generation:
            return
        with self._lock:
            if self._halted and self._report is not None and self._summons.empty():
                again = msg.Report(generation=pause.generation, standing=self._report.standing, reason="asked again")
            else:
                again = None
                if pause.at_boundary and pause.generation == self._generation:
                    self.order = pause
                else:
                    self._asked_to_report = pause.generation
                    self.order = pause
                    self._stop_group()
        if again is not None:
            self._link.send(again)

    def _stop_group(self) -> None:
        """Called under the lock."""
        if self._meeting is not None:
            self._meeting.cancel()
        if self._group is not None:
            self._group.abort()


_MEET_S = 10.0

__all__ = ["NOTHING", "Agent", "Order", "Summons"]
