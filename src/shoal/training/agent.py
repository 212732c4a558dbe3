"""The worker's side of the control link, on a thread of its own, so that heartbeats go on whatever the loop does."""

from __future__ import annotations

import queue
import threading
from collections import deque
from dataclasses import dataclass, field
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
_PROBE_S = 0.5
_SUSPICIOUS_WAIT_S = 1.0

Order = msg.Pause | msg.Deal | msg.Conclude
Summons = msg.Enter | msg.Dismissed | msg.Ended


@dataclass
class Progress:
    """What heartbeats tell. Written by the loop, read by the agent."""

    step: int = -1
    stable_step: int = -1
    phase: str = "start"
    since_s: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)


class Agent:
    """Speaks for a worker. The loop calls its methods; the thread answers the coordinator.

    The loop either rests (it waits in ``next_summons``, and the agent tells what it holds to whoever asks) or takes
    part in a generation, in which it looks at ``order`` once a step.
    """

    def __init__(self, address: str, key: JobKey, name: str, identity: msg.Identity, meet_s: float) -> None:
        self.name = name
        self.order: Order | None = None
        self.leaves = False
        """Whether this worker has been asked to leave."""
        self._clock: Clock = SystemClock()
        self._identity = identity
        self._meet_s = meet_s
        self._progress = Progress()
        self._link: Link[Any] = Link(address, key, name, msg.ToWorker)  # type: ignore[arg-type]
        self._waker = self._link.waker()
        self._outbox: deque[object] = deque()
        self._summons: queue.SimpleQueue[Summons] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._generation = 0
        self._rests = True
        self._standing = NOTHING
        self._stopped_generation = 0
        self._asked_generation = 0
        self._group: Group | None = None
        self._bytes_seen: tuple[int, int] | None = None
        self._meeting: Meeting | None = None
        self._peers: dict[str, str] = {}
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

    def leave(self) -> None:
        """Ask to be let go at the next boundary, from any thread."""
        self.leaves = True
        self.send(msg.Leave())

    def note(self, kind: str, **fields: Any) -> None:
        """An event for the run's log."""
        self.send(msg.Note(event={"at_s": self._clock.wall_s(), "kind": kind, **fields}))

    def next_summons(self) -> Summons:
        """Wait for the next generation, or the end."""
        return self._summons.get()

    def meeting(self) -> Meeting:
        """Where the members of the newest generation meet."""
        with self._lock:
            assert self._meeting is not None
            return self._meeting

    def heeded(self, order: Order) -> None:
        """``order`` has been carried out; one that came after it stands."""
        with self._lock:
            if self.order is order:
                self.order = None

    def watch_over(self, group: Group) -> None:
        """Abort ``group`` when its generation is halted, at once if it has been."""
        with self._lock:
            self._group = group
            if self._stopped_generation >= group.seat.generation or self._generation > group.seat.generation:
                group.abort()

    def rest(self, generation: int, standing: Standing) -> None:
        """The loop is about to wait for a summons, and holds this. A pause that came too late is answered."""
        pause = self._settle(generation, standing)
        if isinstance(pause, msg.Pause):
            self.send(msg.Report(generation=pause.generation, standing=standing, reason="asked while coming to rest"))

    def report(self, generation: int, standing: Standing, cut: frozenset[str], reason: str) -> None:
        """The loop has stopped and rests; tell the coordinator so."""
        self._settle(generation, standing)
        number = max(generation, self._asked_generation)
        self.send(msg.Report(generation=number, standing=standing, unreachable=sorted(cut), reason=reason))

    def _settle(self, generation: int, standing: Standing) -> Order | None:
        with self._lock:
            if self._generation != generation:
                return None
            order = self.order
            self._rests, self._standing, self._group, self.order = True, standing, None, None
            return order

    def at(self, phase: str, step: int | None = None, stable_step: int | None = None) -> None:
        """What the loop does from now on, for heartbeats."""
        progress = self._progress
        progress.phase, progress.since_s = phase, self._clock.monotonic_s()
        progress.step = progress.step if step is None else step
        progress.stable_step = progress.stable_step if stable_step is None else stable_step

    def tell(self, figures: dict[str, float]) -> None:
        """The newest figures, for heartbeats."""
        self._progress.figures = figures

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
        if at.phase == "wait" and now_s - at.since_s > _SUSPICIOUS_WAIT_S:
            self._look_for_progress(now_s)
        self._link.send(
            msg.Beat(
                generation=self._generation,
                step=at.step,
                stable_step=at.stable_step,
                phase=at.phase,
                phase_s=now_s - at.since_s,
                figures=at.figures,
            )
        )

    def _look_for_progress(self, now_s: float) -> None:
        """A long wait in which bytes still move is a slow link, not a cut one: count it from now."""
        with self._lock:
            traffic = self._group.traffic() if self._group is not None else None
        moved = (traffic.sent_bytes, traffic.received_bytes) if traffic is not None else None
        if moved is not None and moved != self._bytes_seen:
            self._bytes_seen = moved
            self._progress.since_s = now_s

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
            case msg.Deal() | msg.Conclude():
                with self._lock:
                    if message.generation == self._generation:
                        self.order = message
            case msg.Dismissed() | msg.Ended():
                self._summons.put(message)
                with self._lock:
                    self._stop_group()

    def _introduce_again(self) -> None:
        """A replaced coordinator asks who we are."""
        if self._generation == 0:
            self._link.send(msg.Hello(identity=self._identity))
            return
        with self._lock:
            rests, generation = self._rests, self._generation
            standing = self._standing if rests else Standing(self._progress.step)
        self._link.send(msg.Attach(identity=self._identity, generation=generation, standing=standing, halted=rests))
        if self.leaves:
            self._link.send(msg.Leave())

    def _summon(self, enter: msg.Enter) -> None:
        generation = enter.world.generation
        if generation <= self._generation:
            return

        def publish(key: str, value: bytes) -> None:
            self.send(msg.Meet(generation=generation, key=key, value=value))

        with self._lock:
            self._stop_group()
            self._generation, self._rests, self.order = generation, False, None
            self._meeting = Meeting(generation, publish, timeout_s=self._meet_s)
        self._summons.put(enter)

    def _pause(self, pause: msg.Pause) -> None:
        if pause.generation < self._generation:
            return
        answer = None
        with self._lock:
            self._asked_generation = pause.generation
            if self._rests:
                answer = msg.Report(generation=pause.generation, standing=self._standing, reason="asked while at rest")
            else:
                self.order = pause
                if not pause.at_boundary or pause.generation > self._generation:
                    self._stop_group()
        if answer is not None:
            self._link.send(answer)

    def _stop_group(self) -> None:
        """Called under the lock."""
        self._stopped_generation = self._generation
        if self._meeting is not None:
            self._meeting.cancel()
        if self._group is not None:
            self._group.abort()
