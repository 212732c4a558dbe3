"""One shard: answers questions about its tables from whoever holds the job's key, one after another."""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shoal.comm.calls import Answerer, Question
from shoal.comm.keys import JobKey
from shoal.comm.streams import Buffer
from shoal.errors import Behind, Bug, ConfigError, Fault, ShoalError
from shoal.shards import messages as msg
from shoal.shards.client import map_of, told_of
from shoal.shards.copies import Copies
from shoal.shards.holdings import Holdings
from shoal.shards.loads import Loads
from shoal.shards.mirror import Mirror
from shoal.shards.order import Peers
from shoal.tables import TableSpec
from shoal.tables.batches import halved
from shoal.tables.buckets import BucketMap
from shoal.tables.consistency import NOW, Bounded, Sync
from shoal.tables.files import write_whole
from shoal.tables.frame import Begin, Import, Push, bytes_of, decode
from shoal.tables.journal import Journal, Keeping
from shoal.tables.stored import JournalFolder, unpacked

_DECODER = msgspec.msgpack.Decoder(msg.Question)
_ENCODER = msgspec.msgpack.Encoder()
_LEAST_LOG_BYTES = 1 << 28
_LAST_TIMES = 512
_TICK_S = 0.05


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


@dataclass(frozen=True)
class Doors:
    """Where a shard is asked, and, if there is to be a copy of its folder, what asks for that."""

    answerer: Answerer
    mirror: Mirror | None = None


class _Gone(msgspec.Struct, frozen=True):
    """Buckets that were given away, and with what: kept until they are served elsewhere."""

    told: msg.Handed
    body: bytes
    buckets: bytes
    map: msg.Map


class Shard:
    """``name`` is how the map of buckets knows it. What it is given is kept in ``folder``, and found there again.

    ``key`` None: without encryption, on a network that is trusted. ``serve`` returns once ``stop`` was called. With
    ``durability="replica"`` it answers once it was told of its ``peers``, and has heard from its standby.
    """

    def __init__(self, name: str, folder: Path, buckets: BucketMap, keeping: Keeping, doors: Doors) -> None:
        self.name = name
        self._folder = folder
        self._keeping = keeping
        self._buckets = buckets
        self._answerer, self._mirror = doors.answerer, doors.mirror
        self._copies = Copies(folder)
        self._early: list[tuple[Question, msg.Question]] = []
        self._held: deque[tuple[int, Question, bytes, Buffer]] = deque()
        self._told: deque[Peers] = deque()
        self._holdings: Holdings | None = None
        self._addresses: dict[str, str] = {}
        self._coming: dict[str, Journal] = {}
        self._waiting: list[tuple[Question, msg.Pull]] = []
        self._stopped = self._is_open = False
        self._pulls, self._pushes = _Times(), _Times()
        self._loads = Loads()
        self._staleness: dict[int, int] = {}
        self._num_zombies = self._num_again = 0
        if self._mirror is None:
            self._go_on()

    def _go_on(self) -> None:
        """Where its folder says."""
        path = self._folder / "map"
        if path.exists():  # where the others were then is of no use
            self._buckets = map_of(msgspec.msgpack.decode(path.read_bytes(), type=msg.Map))
        contents = JournalFolder(self._folder).contents()
        if contents is not None:
            self._open([TableSpec.read(record) for record in contents.specs])
        self._is_open = True

    @property
    def address(self) -> str:
        return self._answerer.address

    def stop(self) -> None:
        """Have ``serve`` return, from a signal handler."""
        self._stopped = True

    def meet(self, peers: Peers) -> None:
        """Where the others are from now on, its standby among them; from any thread."""
        self._told.append(peers)

    def serve(self) -> None:
        """Answer until ``stop``. ``Fault`` if another has taken this one's place; ``StoreFault`` without its folder."""
        try:
            while not self._stopped:
                question = self._answerer.receive(_TICK_S)
                if question is not None:
                    self._handle(question)
                self._hear()
                if self._mirror is not None:
                    self._see_to(self._mirror)
        finally:
            self.close()

    def _hear(self) -> None:
        """Where the others are."""
        while self._told:
            peers = self._told.popleft()
            self._addresses |= peers.addresses
            if self._mirror is not None:
                self._mirror.meet(peers.standby, peers.addresses[peers.standby])

    def _see_to(self, mirror: Mirror) -> None:
        """The standby's answers: what they let out, and what they let begin."""
        mirror.turn()
        if mirror.is_begun and not self._is_open:
            self._go_on()
            early, self._early = self._early, []
            for question, asked in early:
                self._try(question, asked)
        while self._held and self._held[0][0] <= mirror.reached:
            _, question, head, body = self._held.popleft()
            self._answerer.answer(question, head, body)
        if mirror.has_failed:
            self._refuse_pushes(mirror.trouble)

    def _refuse_pushes(self, reason: str) -> None:
        """Those that are held are applied, and known if they are sent again; what else is held waits on, as long as who
        asked does. All that came before this shard could begin is refused, too."""
        held, self._held = self._held, deque()
        refused, self._early = [question for question, _ in self._early], []
        for entry in held:
            if isinstance(_DECODER.decode(entry[1].head), msg.Push):
                refused.append(entry[1])
            else:
                self._held.append(entry)
        for question in refused:
            self._answer(question, msg.Refused("StoreFault", reason))

    def close(self) -> None:
        if self._mirror is not None:
            self._mirror.close()
        for journal in self._coming.values():
            journal.close()
        if self._holdings is not None:
            self._holdings.close()
        self._answerer.close()

    # Questions

    def _handle(self, question: Question) -> None:
        try:
            asked = _DECODER.decode(question.head)
        except (msgspec.MsgspecError, IndexError) as error:
            self._answer(question, msg.Refused("ConfigError", f"not a question that a shard takes: {error}"))
            return
        if self._is_open or isinstance(asked, msg.Keep):
            self._try(question, asked)
        else:
            _put_aside(self._early, question, asked)

    def _try(self, question: Question, asked: msg.Question) -> None:
        try:
            self._take(question, asked)
        except ShoalError as error:
            self._answer(question, msg.Refused(type(error).__name__, str(error)))

    def _take(self, question: Question, asked: msg.Question) -> None:
        match asked:
            case msg.Pull():
                if self._is_of_another_map(question, asked.epoch):
                    return
                if asked.step == NOW or self._tables.is_ready(asked.step):
                    self._pull(question, asked)
                else:
                    self._check_reach(asked)
                    _put_aside(self._waiting, question, asked)
            case msg.Push():
                if not self._is_of_another_map(question, asked.epoch):
                    self._push(question, asked)
            case msg.Begin() if self._is_of_another_map(question, asked.epoch):
                pass
            case msg.Begin():
                verdict = self._tables.begin(Begin(asked.generation, asked.base))
                self._promise(question, msg.Taken(verdict.value))
                self._answer_those_that_wait()
            case msg.Open():
                self._open([TableSpec.read(record) for record in asked.specs])
                self._promise(question, msg.Done())
            case msg.Mark() if self._is_of_another_map(question, asked.epoch):
                pass
            case msg.Mark():
                self._tables.mark(asked.step, asked.keep, told_of(self._buckets, self._addresses))
                self._promise(question, msg.Done())
            case msg.Ask():
                self._answer(question, self._standing())
            case msg.Look():
                self._answer(question, self._copies.look(asked))
            case msg.Copy():
                self._copies.write(asked, question.body)
                self._answer(question, msg.Done())
            case msg.Fetch():
                self._answer(question, msg.Done(), self._copies.read(asked))
            case _:
                self._move(question, asked)

    def _move(self, question: Question, asked: msg.Question) -> None:
        """Buckets that come and go. Each question may be asked again."""
        match asked:
            case msg.HandOver():
                buckets = unpacked(asked.buckets)
                journal = self._tables.of(buckets).journal
                self._give(question, [journal.hand_over(buckets, asked.since)])
            case msg.LetGo():
                self._let_go(question, asked)
            case msg.TakeIn():
                if asked.first:
                    self._forget_moves()
                    self._coming[asked.move] = self._tables.receive(f"move-{asked.move}")
                elif asked.move not in self._coming:
                    raise ConfigError(f"nothing of {asked.move} is here; begin with its first part")
                entry = decode(question.body)
                assert isinstance(entry, Import)
                self._coming[asked.move].take_over(entry)
                self._promise(question, msg.Done())
            case msg.TakeOver():
                self._take_over(asked, question)
                self._promise(question, msg.Done())
                self._answer_those_that_wait()
            case msg.Forget():
                for holding in self._tables.all:
                    holding.journal.drop(unpacked(asked.buckets) & ~holding.buckets)
                (self._folder / f"gone-{asked.move}").unlink(missing_ok=True)
                self._promise(question, msg.Done())
            case msg.Return():
                if asked.map.epoch > self._buckets.epoch:
                    for path in self._folder.glob("gone-*"):
                        path.unlink()
                    self._tables.return_to(asked.step)
                    self._use(asked.map)
                self._promise(question, msg.Done())
            case msg.Use():
                self._use(asked.map)
                self._promise(question, msg.Done())
                self._answer_those_that_wait()

    def _let_go(self, question: Question, asked: msg.LetGo) -> None:
        """What is given is kept first: whoever asks again is given the same."""
        path = self._folder / f"gone-{asked.move}"
        if not path.exists():
            buckets = unpacked(asked.buckets)
            entry, pushes = self._tables.of(buckets).journal.let_go(buckets, asked.since)
            told, body = self._handed([entry, *pushes])
            write_whole(path, msgspec.msgpack.encode(_Gone(told, body, asked.buckets, asked.map)))
        gone = self._be_gone(path)
        self._promise(question, gone.told, gone.body)
        self._answer_those_that_wait()

    def _be_gone(self, path: Path) -> _Gone:
        """Serve what was given away no longer; also for who is started in this one's place in the middle of it."""
        gone = msgspec.msgpack.decode(path.read_bytes(), type=_Gone)
        if gone.map.epoch < self._buckets.epoch:  # they may have come back
            return gone
        self._use(gone.map)
        self._tables.give_up(unpacked(gone.buckets))
        return gone

    def _take_over(self, asked: msg.TakeOver, question: Question) -> None:
        if any(holding.folder == f"move-{asked.move}" for holding in self._tables.all):
            return  # it has been
        if asked.move not in self._coming:
            self._coming[asked.move] = self._tables.reopen(f"move-{asked.move}")
        journal = self._coming[asked.move]
        body, at, entries = question.body, 0, []
        for length in asked.lengths:
            entries.append(decode(body[at : at + length]))
            at += length
        last, *pushes = entries
        assert isinstance(last, Import)
        journal.take_over(last, [push for push in pushes if isinstance(push, Push)])
        self._tables.add(f"move-{asked.move}", unpacked(asked.buckets), self._coming.pop(asked.move))
        self._use(asked.map)

    def _give(self, question: Question, entries: Sequence[Import | Push]) -> None:
        told, body = self._handed(entries)
        self._promise(question, told, body)

    def _handed(self, entries: Sequence[Import | Push]) -> tuple[msg.Handed, bytes]:
        bodies = [b"".join(entry.encode()) for entry in entries]
        first = entries[0]
        assert isinstance(first, Import)
        clocks = {name: meta["clock"] for name, meta in msgspec.json.decode(first.metas).items()}
        return msg.Handed([len(body) for body in bodies], clocks), b"".join(bodies)

    def _forget_moves(self) -> None:
        """There is one mover: what came of a move before this one will not go on."""
        for move, journal in self._coming.items():
            journal.close()
            shutil.rmtree(self._folder / f"move-{move}", ignore_errors=True)
        self._coming.clear()

    def _use(self, told: msg.Map) -> None:
        """The map from now on, also for who is started in this one's place. ``Fault`` for one by which this shard has
        buckets that it does not hold."""
        if told.epoch > self._buckets.epoch:
            if self._holdings is not None and self.name in told.shards:
                mine = map_of(told).owners == told.shards.index(self.name)
                missing = int((mine & ~self._holdings.held).sum())
                if missing:
                    raise Fault(f"shard {self.name} does not hold {missing} of the buckets that a new map gives it")
            write_whole(self._folder / "map", msgspec.msgpack.encode(told))
            self._buckets, self._addresses = map_of(told), self._addresses | told.addresses

    def _pull(self, question: Question, asked: msg.Pull) -> None:
        begun_s = time.perf_counter()
        tables, staleness = self._tables, 0
        if asked.step != NOW:
            staleness = max(0, asked.step - tables.step)
            self._check_promise(asked.step, staleness)
        ids = np.frombuffer(question.body, np.int64)
        rows = tables.pull(asked.table, ids, asked.step)
        head = msg.Rows(rows.shape[1], asked.half, staleness)
        self._answer(question, head, bytes_of(halved(rows) if asked.half else rows))
        self._loads.note(ids)
        self._staleness[staleness] = self._staleness.get(staleness, 0) + 1
        self._pulls.add(time.perf_counter() - begun_s)

    def _check_reach(self, asked: msg.Pull) -> None:
        """What was acknowledged and is not here was lost: nobody will push it again."""
        reached = self._tables.step
        num_missing = asked.step - asked.early - reached
        most_missing = 0 if not asked.waits else 1 if isinstance(self._keeping.consistency, Sync) else num_missing
        if num_missing > most_missing:
            raise Behind(
                f"shard {self.name} is at step {reached}, and step {asked.step} was to be read", step=asked.step
            )

    def _check_promise(self, step: int, staleness: int) -> None:
        """No read is ever staler than was promised."""
        consistency = self._keeping.consistency
        if isinstance(consistency, Bounded) and staleness > consistency.steps:
            raise Bug(f"shard {self.name} was about to answer a read of step {step} that is {staleness} steps stale")

    def _push(self, question: Question, asked: msg.Push) -> None:
        begun_s = time.perf_counter()
        push = decode(question.body)
        if not isinstance(push, Push):
            raise ConfigError(f"a {type(push).__name__} came where a push was to come")
        verdict = self._tables.push(push, asked.worker)
        self._promise(question, msg.Taken(verdict.value))
        self._num_zombies += verdict.value == "zombie"
        self._num_again += verdict.value == "known"
        self._answer_those_that_wait()
        self._pushes.add(time.perf_counter() - begun_s)
        for holding in self._tables.all:
            if holding.journal.log_bytes > max(_LEAST_LOG_BYTES, 2 * holding.journal.num_bytes):
                holding.journal.snapshot()

    def _answer_those_that_wait(self) -> None:
        waiting, self._waiting = self._waiting, []
        for question, asked in waiting:
            self._try(question, asked)

    def _is_of_another_map(self, question: Question, epoch: int) -> bool:
        if epoch == self._buckets.epoch:
            return False
        self._answer(question, msg.Moved(told_of(self._buckets, self._addresses)))
        return True

    # Tables

    @property
    def _tables(self) -> Holdings:
        if self._holdings is None:
            raise ConfigError(f"shard {self.name} has no tables yet: open them first")
        return self._holdings

    def _open(self, specs: Sequence[TableSpec]) -> None:
        """The first to ask for tables makes them; who comes later must mean the same."""
        if self._holdings is None:
            owned = self._buckets.shards.index(self.name) if self.name in self._buckets.shards else -1
            self._holdings = Holdings(self._folder, specs, self._keeping, self._buckets.owners == owned)
            for path in self._folder.glob("gone-*"):
                if not path.suffix:
                    self._be_gone(path)
            return
        for spec in specs:
            known = self._holdings.specs.get(spec.name)
            if known is None:
                raise ConfigError(f"shard {self.name} has the tables {sorted(self._holdings.specs)}, not {spec.name}")
            if known != spec:
                raise ConfigError(f"two tables are called {spec.name}: {known} is there, and {spec} came")

    def _standing(self) -> msg.Standing:
        figures: dict[str, Any] = {"pid": os.getpid(), "waiting": len(self._waiting)}
        told, loads = told_of(self._buckets, self._addresses), self._loads.counts.astype(np.float32)
        if self._holdings is None:
            return msg.Standing(self.name, 0, 0, [], [], figures, told, [], {}, b"")
        held = self._holdings
        for name in held.specs:
            stats = [holding.journal.tables[name].stats for holding in held.all]
            asked, found = sum(one.num_asked for one in stats), sum(one.num_found for one in stats)
            figures[f"table/{name}"] = {
                "rows": sum(one.num_rows for one in stats), "waiting": sum(one.num_waiting for one in stats),
                "refused": sum(one.num_refused for one in stats), "bytes": sum(one.num_bytes for one in stats),
                "hit_rate": found / asked if asked else 1.0,
            }  # fmt: skip
        figures |= self._pulls.figures("pull") | self._pushes.figures("push")
        figures["log_bytes"] = sum(holding.journal.log_bytes for holding in held.all)
        figures["buckets"] = sum(int(holding.buckets.sum()) for holding in held.all)
        if self._mirror is not None:
            mirror = self._mirror
            figures |= {"standby": mirror.standby, "standby_trouble": mirror.trouble}
            figures["restored_bytes"] = mirror.restored_bytes
        figures["staleness"] = {str(steps): count for steps, count in sorted(self._staleness.items())}
        figures |= {"zombies": self._num_zombies, "again": self._num_again}
        if held.main.torn is not None:
            figures["torn"] = {"bytes": held.main.torn.num_bytes, "reason": held.main.torn.reason}
        buckets = [np.packbits(holding.buckets).tobytes() for holding in held.all]
        figures["hot_buckets"] = self._loads.hottest()
        return msg.Standing(
            self.name, held.step, held.main.applier.generation, held.books(), buckets, figures, told,
            [spec.record() for spec in held.specs.values()], {step: one.map for step, one in held.marked.items()},
            loads.tobytes(),
        )  # fmt: skip

    def _answer(self, question: Question, head: msg.Answer, body: Buffer = b"") -> None:
        self._answerer.answer(question, _ENCODER.encode(head), body)

    def _promise(self, question: Question, head: msg.Answer, body: Buffer = b"") -> None:
        """Answer once what this shard has written is where ``durability`` wants it."""
        if self._mirror is None:
            self._answer(question, head, body)
        else:
            self._held.append((self._mirror.ship(), question, _ENCODER.encode(head), body))


def _put_aside(waiting: list[tuple[Question, Any]], question: Question, asked: Any) -> None:
    """For later, in place of the same question that was asked before."""
    key = (question.peer, question.number)
    waiting[:] = [entry for entry in waiting if (entry[0].peer, entry[0].number) != key]
    waiting.append((question, asked))


def shard_at(
    name: str, folder: Path, buckets: BucketMap, keeping: Keeping, listen: tuple[str, int, JobKey | None]
) -> Shard:
    """A shard that listens at (host, port, key)."""
    answerer = Answerer(*listen)
    mirror = Mirror(name, folder, listen[2], answerer.loop) if keeping.durability == "replica" else None
    try:
        return Shard(name, folder, buckets, keeping, Doors(answerer, mirror))
    except BaseException:
        answerer.close()
        raise
