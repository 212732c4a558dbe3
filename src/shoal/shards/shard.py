"""One shard: answers questions about its tables from whoever holds the job's key, one after another."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shoal.comm.calls import Answerer, Frame, Question, joined, pieces
from shoal.comm.keys import JobKey
from shoal.errors import Bug, ConfigError, ShoalError
from shoal.shards import messages as msg
from shoal.tables import TableSpec
from shoal.tables.applying import NOW
from shoal.tables.batches import halved
from shoal.tables.buckets import BucketMap
from shoal.tables.consistency import Bounded
from shoal.tables.frame import Begin, Push, decode
from shoal.tables.journal import Journal, Keeping
from shoal.tables.stored import JournalFolder

_DECODER = msgspec.msgpack.Decoder(msg.Question)
_ENCODER = msgspec.msgpack.Encoder()
_LEAST_LOG_BYTES = 1 << 28
_LAST_TIMES = 512


@dataclass
class _Times:
    """How long the last questions of a kind took, in seconds."""

    last: deque[float] = field(default_factory=lambda: deque(maxlen=_LAST_TIMES))
    count: int = 0

    def add(self, took_s: float) -> None:
        self.last.append(took_s)
        self.count += 1

    def figures(self, name: str) -> dict[str, float]:
        if not self.last:
            return {}
        values = np.array(self.last) * 1e3
        return {
            f"{name}s": self.count, f"{name}_ms": round(float(np.median(values)), 4),
            f"{name}_p99_ms": round(float(np.percentile(values, 99)), 4),
        }  # fmt: skip


class Shard:
    """``name`` is how the map of buckets knows it. What it is given is kept in ``folder``, and found there again.

    ``key`` None: without encryption, on a network that is trusted. ``serve`` returns once ``stop`` was called.
    """

    def __init__(self, name: str, folder: Path, buckets: BucketMap, keeping: Keeping, answerer: Answerer) -> None:
        self.name = name
        self._folder = folder
        self._keeping = keeping
        self._buckets = buckets
        self._answerer = answerer
        self._journal: Journal | None = None
        self._waiting: list[tuple[Question, msg.Pull]] = []
        self._stopped = False
        self._pulls, self._pushes = _Times(), _Times()
        self._staleness: dict[int, int] = {}
        self._num_zombies = self._num_again = 0
        contents = JournalFolder(folder).contents()
        if contents is not None:
            self._open([TableSpec.read(record) for record in contents.specs])

    @property
    def address(self) -> str:
        return self._answerer.address

    def stop(self) -> None:
        """Have ``serve`` return, from a signal handler."""
        self._stopped = True

    def serve(self) -> None:
        """Answer until ``stop``."""
        while not self._stopped:
            question = self._answerer.receive(0.05)
            if question is not None:
                self._handle(question)
        self.close()

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._answerer.close()

    # Questions

    def _handle(self, question: Question) -> None:
        try:
            asked = _DECODER.decode(question.frames[0])
        except (msgspec.MsgspecError, IndexError) as error:
            self._answer(question, msg.Refused("ConfigError", f"not a question that a shard takes: {error}"))
            return
        try:
            self._take(question, asked)
        except ShoalError as error:
            self._answer(question, msg.Refused(type(error).__name__, str(error)))

    def _take(self, question: Question, asked: msg.Question) -> None:
        match asked:
            case msg.Pull():
                if self._is_of_another_map(question, asked.epoch):
                    return
                if asked.step == NOW or self._tables.applier.is_ready(asked.step):
                    self._pull(question, asked)
                else:
                    self._waiting.append((question, asked))
            case msg.Push():
                if not self._is_of_another_map(question, asked.epoch):
                    self._push(question, asked)
            case msg.Begin():
                verdict = self._tables.begin(Begin(asked.generation, asked.base))
                self._answer(question, msg.Taken(verdict.value))
                self._answer_those_that_wait()
            case msg.Open():
                self._open([TableSpec.read(record) for record in asked.specs])
                self._answer(question, msg.Done())
            case msg.Store():
                self._tables.snapshot()
                self._answer(question, msg.Done())
            case msg.Mark():
                self._tables.mark(asked.step, asked.keep)
                self._answer(question, msg.Done())
            case msg.Ask():
                self._answer(question, self._standing())

    def _pull(self, question: Question, asked: msg.Pull) -> None:
        begun_s = time.perf_counter()
        ids = np.frombuffer(joined(question.frames[1:]), np.int64)
        staleness = max(0, asked.step - self._tables.applier.step) if asked.step != NOW else 0
        self._check_promise(asked.step, staleness)
        rows = self._tables.pull(asked.table, ids, asked.step)
        body = halved(rows) if asked.half else rows
        head = msg.Rows(rows.shape[1], asked.half, staleness)
        self._answer(question, head, *pieces(memoryview(body.reshape(-1).view(np.uint8))))  # type: ignore[arg-type]
        self._staleness[staleness] = self._staleness.get(staleness, 0) + 1
        self._pulls.add(time.perf_counter() - begun_s)

    def _check_promise(self, step: int, staleness: int) -> None:
        """No read is ever staler than was promised."""
        consistency = self._keeping.consistency
        if isinstance(consistency, Bounded) and staleness > consistency.steps:
            raise Bug(f"shard {self.name} was about to answer a read of step {step} that is {staleness} steps stale")

    def _push(self, question: Question, asked: msg.Push) -> None:
        begun_s = time.perf_counter()
        push = decode(joined(question.frames[1:]))
        if not isinstance(push, Push):
            raise ConfigError("a beginning came where a push was to come")
        verdict = self._tables.push(push, asked.worker)
        self._answer(question, msg.Taken(verdict.value))
        self._num_zombies += verdict.value == "zombie"
        self._num_again += verdict.value == "known"
        self._answer_those_that_wait()
        self._pushes.add(time.perf_counter() - begun_s)
        if self._tables.log_bytes > max(_LEAST_LOG_BYTES, 2 * self._tables.num_bytes):
            self._tables.snapshot()

    def _answer_those_that_wait(self) -> None:
        waiting, self._waiting = self._waiting, []
        for question, asked in waiting:
            self._handle_pull_again(question, asked)

    def _handle_pull_again(self, question: Question, asked: msg.Pull) -> None:
        if not self._tables.applier.is_ready(asked.step):
            self._waiting.append((question, asked))
            return
        try:
            self._pull(question, asked)
        except ShoalError as error:
            self._answer(question, msg.Refused(type(error).__name__, str(error)))

    def _is_of_another_map(self, question: Question, epoch: int) -> bool:
        if epoch == self._buckets.epoch:
            return False
        owner_of = np.array(self._buckets.owner_of, np.int16).tobytes()
        self._answer(question, msg.Moved(self._buckets.epoch, list(self._buckets.shards), owner_of))
        return True

    # Tables

    @property
    def _tables(self) -> Journal:
        if self._journal is None:
            raise ConfigError(f"shard {self.name} has no tables yet: open them first")
        return self._journal

    def _open(self, specs: Sequence[TableSpec]) -> None:
        """The first to ask for tables makes them; who comes later must mean the same."""
        if self._journal is None:
            self._journal = Journal(self._folder, specs, self._keeping)
            return
        for spec in specs:
            known = self._journal.tables.get(spec.name)
            if known is None:
                raise ConfigError(f"shard {self.name} has the tables {sorted(self._journal.tables)}, not {spec.name}")
            if known.spec != spec:
                raise ConfigError(f"two tables are called {spec.name}: {known.spec} is there, and {spec} came")

    def _standing(self) -> msg.Standing:
        figures: dict[str, Any] = {"pid": os.getpid(), "waiting": len(self._waiting)}
        if self._journal is None:
            return msg.Standing(self.name, 0, 0, {}, figures)
        for name, table in self._journal.tables.items():
            stats = table.stats
            figures[f"table/{name}"] = {
                "rows": stats.num_rows, "waiting": stats.num_waiting, "refused": stats.num_refused,
                "bytes": stats.num_bytes, "hit_rate": stats.num_found / stats.num_asked if stats.num_asked else 1.0,
            }  # fmt: skip
        figures |= self._pulls.figures("pull") | self._pushes.figures("push")
        figures["log_bytes"] = self._journal.log_bytes
        figures["staleness"] = {str(steps): count for steps, count in sorted(self._staleness.items())}
        figures |= {"zombies": self._num_zombies, "again": self._num_again}
        if self._journal.torn is not None:
            figures["torn"] = {"bytes": self._journal.torn.num_bytes, "reason": self._journal.torn.reason}
        applier = self._journal.applier
        return msg.Standing(self.name, applier.step, applier.generation, applier.cursors(), figures)

    def _answer(self, question: Question, head: msg.Answer, *frames: Frame) -> None:
        self._answerer.answer(question, _ENCODER.encode(head), *frames)


def shard_at(
    name: str, folder: Path, buckets: BucketMap, keeping: Keeping, listen: tuple[str, int, JobKey | None]
) -> Shard:
    """A shard that listens at (host, port, key)."""
    answerer = Answerer(*listen)
    try:
        return Shard(name, folder, buckets, keeping, answerer)
    except BaseException:
        answerer.close()
        raise
