"""A worker's side: which shard has which id, one frame a shard, many questions open."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shoal import errors
from shoal.comm.calls import Calls
from shoal.comm.keys import JobKey
from shoal.comm.streams import Buffer
from shoal.errors import Behind, Bug, ConfigError, Fault, LinkFault, ShoalError
from shoal.shards import messages as msg
from shoal.tables import TableSpec
from shoal.tables.batches import by_owner, doubled
from shoal.tables.book import Span, Verdict
from shoal.tables.buckets import BucketMap
from shoal.tables.consistency import NOW
from shoal.tables.frame import Part, Push, bytes_of

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
Routes = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""The places of ids in the order of their shards, and where each shard's begin."""

_DECODER = msgspec.msgpack.Decoder(msg.Answer)
_ENCODER = msgspec.msgpack.Encoder()
_MOST_MAPS, _BREATH_S = 5000, 0.001


class NotThisMap(Fault):
    """The map of buckets has changed: the question is to be asked again, by the new one."""


class NotInOrder(Fault):
    """A push does not continue what a shard has of its lanes."""


@dataclass
class Pulling:
    """A pull that was asked and not answered: ``Client.rows`` waits for it."""

    table: str
    ids: Ids
    step: int
    tickets: dict[str, int]
    routes: Routes | None
    early: bool
    shards: tuple[str, ...]


@dataclass
class Pushing:
    """A push that was sent and not acknowledged: ``Client.settle`` waits for it."""

    push: Push
    tickets: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How shards are asked. ``patience_s``: how long one may be away. ``half``: rows travel as bfloat16. ``waits``:
    what is read may still be on its way to a shard; else one that lacks it is ``Behind``."""

    patience_s: float = 30.0
    half: bool = False
    waits: bool = True


class Client:
    """Asks the shards of a map; one thread. Ids of a pull, or of a push's part, are distinct (``tables.batches``)."""

    def __init__(
        self, key: JobKey | None, buckets: BucketMap, addresses: Mapping[str, str], worker: str = "",
        manner: Manner | None = None,
    ) -> None:  # fmt: skip
        self.buckets = buckets
        self.worker = worker
        self._manner = manner or Manner()
        self.check: Callable[[], None] = lambda: None
        """Called now and then while an answer is waited for; it may raise."""
        self.staleness: Counter[int] = Counter()
        """How many pulls were how many steps stale."""
        self._calls = Calls(key, addresses)
        self._dims: dict[str, int] = {}
        self._opening = msg.Open([])

    def meet(self, shard: str, address: str) -> None:
        """A shard is found there from now on."""
        self._calls.meet(shard, address)

    def introduce(self, shard: str, address: str) -> None:
        """Meet a shard that has no buckets yet, and have the tables be there."""
        self.meet(shard, address)
        self.tell(shard, self._opening)

    def open(self, specs: Sequence[TableSpec]) -> None:
        """Have these tables be there. ``ConfigError`` if others of these names are."""
        self._opening = msg.Open([spec.record() for spec in specs])
        self._ask_all(self._opening)
        self._dims |= {spec.name: spec.dim for spec in specs}

    def begin(self, generation: int, base: int = 0) -> None:
        """Have a generation begin on all shards. ``Fault`` if it is over, ``Behind`` if one cannot stand at ``base``.
        What was asked before is of no more use."""
        self._calls.forget_all()
        for shard, answer in self._ask_all_of_map(lambda epoch: msg.Begin(epoch, generation, base)).items():
            verdict = Verdict(_as(answer, msg.Taken).verdict)
            if verdict is Verdict.ZOMBIE:
                raise Fault(f"generation {generation} is over: shard {shard} is beyond it", generation=generation)
            if verdict is Verdict.AMISS:
                raise Behind(f"shard {shard} cannot stand at step {base}", generation=generation, step=base)

    def mark(self, step: int, keep: Collection[int] = ()) -> None:
        """Have every shard remember how it stands at ``step``, and at those of ``keep``."""
        self._ask_all_of_map(lambda epoch: msg.Mark(epoch, step, sorted(keep)))

    def standings(self) -> dict[str, msg.Standing]:
        """How each shard stands."""
        return {shard: _as(answer, msg.Standing) for shard, answer in self._ask_all(msg.Ask()).items()}

    # Pulls

    def pull(self, table: str, ids: Ids, step: int = NOW) -> Weights:
        """(n,) ids -> (n, dim) float32."""
        return self.rows(self.ask(table, ids, step))

    def ask(self, table: str, ids: Ids, step: int = NOW, *, early: bool = False) -> Pulling:
        """Begin to pull; ``early``: what is to be read is not there yet."""
        if table not in self._dims:
            raise ConfigError(f"there is no table {table!r}; there are {', '.join(self._dims) or 'none'}")
        manner, shards = self._manner, self.buckets.shards
        width = self._dims[table] * (2 if manner.half else 4)
        head = _ENCODER.encode(msg.Pull(self.buckets.epoch, table, step, manner.half, manner.waits, early))
        tickets: dict[str, int] = {}
        routes = self._routes(ids)
        for index, shard in enumerate(shards):
            own = ids if routes is None else ids[_of_shard(routes, index)]
            if len(own):
                tickets[shard] = self._calls.ask(shard, head, bytes_of(own), expects=len(own) * width)
        return Pulling(table, ids, step, tickets, routes, early, shards)

    def _routes(self, ids: Ids) -> Routes | None:
        shards = self.buckets.shards
        return by_owner(ids, self.buckets.owners, len(shards)) if len(shards) > 1 else None

    def rows(self, pulling: Pulling) -> Weights:
        """What a pull has come to. ``LinkFault`` if a shard stays away, ``Fault`` for a step that is gone."""
        for _ in range(_MOST_MAPS):
            try:
                return self._rows(pulling)
            except NotThisMap:
                pulling = self.ask(pulling.table, pulling.ids, pulling.step, early=pulling.early)
        raise Bug("the map of buckets changes faster than it can be followed")

    def drop(self, pulling: Pulling) -> None:
        """Nobody will wait for it."""
        self._calls.forget(pulling.tickets.values())

    def _rows(self, pulling: Pulling) -> Weights:
        dim, routes, staleness = self._dims[pulling.table], pulling.routes, 0
        out: Weights | None = None
        for shard, ticket in pulling.tickets.items():
            head, body = self._wait(ticket)
            rows = _as(self._checked(head, pulling.tickets.values()), msg.Rows)
            staleness = max(staleness, rows.staleness)
            raw = np.frombuffer(body, np.uint16 if rows.half else np.float32).reshape(-1, dim)
            values: Any = doubled(raw) if rows.half else raw
            if routes is None:
                out = values
            else:
                out = np.empty((len(pulling.ids), dim), np.float32) if out is None else out
                out[_of_shard(routes, pulling.shards.index(shard))] = values
        self.staleness[staleness] += 1
        return np.empty((0, dim), np.float32) if out is None else out

    # Pushes

    def send(self, push: Push) -> Pushing:
        """Send a push: every shard is sent its part of it, be it empty, so that all know what is done."""
        pushing = Pushing(push, {})
        self._send(pushing)
        return pushing

    def _send(self, pushing: Pushing) -> None:
        push, head = pushing.push, _ENCODER.encode(msg.Push(self.buckets.epoch, self.worker))
        pushing.tickets.clear()  # of shards that are not in the map any more
        parts: list[list[Part]] = [[] for _ in self.buckets.shards]
        for part in push.parts:
            routes = self._routes(part.ids)
            for index, own in enumerate(parts):
                of = slice(None) if routes is None else _of_shard(routes, index)
                own.append(Part(part.table, part.ids[of], part.gradients[of]))
        for shard, own in zip(self.buckets.shards, parts, strict=True):
            body = Push(push.generation, push.lanes, own, push.now_s).encode()
            pushing.tickets[shard] = self._calls.ask(shard, head, *body)

    def settle(self, pushing: Pushing) -> set[Verdict]:
        """Wait until all shards have acknowledged a push: what they found it to be. ``Fault`` for a zombie's, or one
        that does not continue its lanes; ``Diverged`` and ``ConfigError`` for one that cannot be applied."""
        for attempt in range(_MOST_MAPS):
            try:
                return self._settle(pushing)
            except NotThisMap:
                self._send(pushing)
            except NotInOrder:
                if attempt:
                    raise
                self._send(pushing)  # what it continues had been lost on the way, and has come meanwhile
        raise Bug("the map of buckets changes faster than it can be followed")

    def _settle(self, pushing: Pushing) -> set[Verdict]:
        found: set[Verdict] = set()
        for shard, ticket in pushing.tickets.items():
            answer = self._checked(self._wait(ticket)[0], pushing.tickets.values())
            verdict = Verdict(_as(answer, msg.Taken).verdict)
            if verdict is Verdict.ZOMBIE:
                number = pushing.push.generation
                raise Fault(f"generation {number} is over: shard {shard} is beyond it", generation=number)
            if verdict is Verdict.AMISS:
                raise NotInOrder(
                    f"a push of {_spans(pushing.push.lanes)} does not continue what shard {shard} has of them"
                )
            found.add(verdict)
        return found

    # Asking

    def tell(self, shard: str, message: msg.Question, body: Buffer = b"") -> tuple[msg.Answer, memoryview]:
        """Ask one shard, with a body: its answer, and the body of that."""
        ticket = self._calls.ask(shard, _ENCODER.encode(message), body)
        head, answered = self._wait(ticket)
        return self._checked(head, [ticket]), answered

    def _ask_all(self, message: msg.Question) -> dict[str, msg.Answer]:
        head = _ENCODER.encode(message)
        tickets = {shard: self._calls.ask(shard, head) for shard in self.buckets.shards}
        return {
            shard: self._checked(self._wait(ticket)[0], tickets.values()) for shard, ticket in tickets.items()
        }  # fmt: skip

    def _ask_all_of_map(self, question: Callable[[int], msg.Question]) -> dict[str, msg.Answer]:
        """Ask all shards that have buckets, in one map of them."""
        for _ in range(_MOST_MAPS):
            with suppress(NotThisMap):
                return self._ask_all(question(self.buckets.epoch))
        raise Bug("the map of buckets changes faster than it can be followed")

    def _wait(self, ticket: int) -> tuple[memoryview, memoryview]:
        return self._calls.wait(ticket, self._manner.patience_s, self.check)

    def _checked(self, head: memoryview, tickets: Any) -> msg.Answer:
        answer: msg.Answer = _DECODER.decode(head)
        if isinstance(answer, msg.Refused):
            self._calls.forget(tickets)
            raise _error(answer)
        if isinstance(answer, msg.Moved):
            self._calls.forget(tickets)
            self._follow(answer.map)
            raise NotThisMap("the map of buckets has changed")
        return answer

    def _follow(self, told: msg.Map) -> None:
        """A newer map is taken, once it is known where its shards are; who tells of an older one is about to hear of
        ours."""
        unknown = {name for name in told.shards if not self._calls.knows(name)} - told.addresses.keys()
        if told.epoch <= self.buckets.epoch or unknown:
            time.sleep(_BREATH_S)
            return
        self.buckets = map_of(told)
        for name, address in told.addresses.items():
            self._calls.meet(name, address)

    def close(self) -> None:
        self._calls.close()


def map_of(told: msg.Map) -> BucketMap:
    """The value."""
    return BucketMap(told.epoch, tuple(told.shards), tuple(np.frombuffer(told.owner_of, np.int16).tolist()))


def told_of(buckets: BucketMap, addresses: Mapping[str, str]) -> msg.Map:
    """As a message."""
    owner_of = np.array(buckets.owner_of, np.int16).tobytes()
    return msg.Map(buckets.epoch, list(buckets.shards), owner_of, dict(addresses))


def _error(refused: msg.Refused) -> ShoalError:
    kind = getattr(errors, refused.kind, None)
    if isinstance(kind, type) and issubclass(kind, ShoalError):
        return kind(refused.reason)
    return LinkFault(f"{refused.kind}: {refused.reason}")


def _as(answer: msg.Answer, kind: type[Any]) -> Any:
    if not isinstance(answer, kind):
        raise Bug(f"a shard was to answer with {kind.__name__} and answered with {type(answer).__name__}")
    return answer


def _of_shard(routes: Routes, index: int) -> npt.NDArray[np.int32]:
    order, starts = routes
    return order[starts[index] : starts[index + 1]]


def _spans(lanes: Mapping[int, Span]) -> str:
    return ", ".join(f"lane {lane} from step {start} to {stop}" for lane, (start, stop) in sorted(lanes.items()))
