"""Table shards as processes of the driver's: started, looked after, and replaced."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shoal.comm.keys import JobKey
from shoal.errors import ShoalError
from shoal.launch.fleet import Place
from shoal.launch.spreading import Spreading
from shoal.shards.child import ShardProcess
from shoal.shards.order import Order
from shoal.tables.files import write_whole
from shoal.training.folder import RunFolder

_MOST_FAILURES, _PAUSE_S = 5, 0.2
_START_S = 300.0
_SPARE_AFTER_S = 0.5
_BALANCE_S, _END_S = 20.0, 10.0


class _Roster(msgspec.Struct):
    """Which shards a run has, as it is kept: ``asked`` by its job, ``wanted`` since; ``first``: those of its first
    map."""

    asked: int
    wanted: int
    first: list[str]
    names: list[str]

    def next_name(self) -> str:
        return f"s{1 + max(int(name[1:]) for name in self.names)}"


@dataclass
class _Shard:
    order: Order
    place: Place
    child: ShardProcess
    address: str = ""
    num_failures: int = 0
    """Since it last said where it listens."""


def num_shards(record: Mapping[str, Any]) -> int:
    """How many a run's job asks for."""
    return int((record["job"].get("strategy") or {}).get("shards", 0))


def _consistency(strategy: Mapping[str, Any]) -> str:
    """As a shard's order has it."""
    told = strategy.get("consistency") or {"kind": "Sync"}
    kind = str(told["kind"]).lower()
    return f"{kind}:{told['steps']}" if kind == "bounded" else kind


class ShardCrew:
    """The shards that a run's record asks for, on the fleet's places in turn. ``since``: the step that it goes on from.

    At each place a spare waits to replace one that ends there. Where none can be started any more, the next place has
    it, if another shard has a copy of what it kept. Another number of them, and one that runs hot, has buckets move; a
    shard that has none left ends once a version is stored that does not need it.
    """

    def __init__(self, folder: RunFolder, record: Mapping[str, Any], places: Sequence[Place], since: int) -> None:
        self._folder = folder
        self._record = record
        self._strategy: dict[str, Any] = record["job"]["strategy"]
        self._places = places
        self._silent_s = float(record["job"]["patience"]["silent_s"])
        self._has_copies = self._strategy["durability"] == "replica"
        self._shards: dict[str, _Shard] = {}
        self._spares: dict[Place, ShardProcess] = {}
        self._spares_from_s = 0.0
        self._said: list[str] = []
        self._spreading: Spreading | None = None
        self._balanced_at_s = time.monotonic()
        self._stored_step = since
        self._leaving: dict[str, int] = {}
        self._has_begun = False
        (folder.path / "shards").mkdir(exist_ok=True)
        self._roster, is_new = self._called()
        self._is_settled = is_new
        """Whether the shards hold what they did when the step was stored that the run goes on from."""
        self._spread_over = set(self._roster.names) if is_new else set()
        self._since = since
        try:
            for name in self._roster.names:
                self._begin(name)
        except BaseException:
            self.close()
            raise

    def _called(self) -> tuple[_Roster, bool]:
        """The roster, and whether it is the run's first."""
        path, asked = self._folder.path / "shards" / "roster.json", num_shards(self._record)
        if not path.exists():
            names = [f"s{number}" for number in range(asked)]
            roster = _Roster(asked, asked, names, list(names))
            self._write(roster)
            return roster, True
        roster = msgspec.json.decode(path.read_bytes(), type=_Roster)
        if roster.asked != asked:
            roster.asked = roster.wanted = asked
        return roster, False

    def _write(self, roster: _Roster) -> None:
        write_whole(self._folder.path / "shards" / "roster.json", msgspec.json.encode(roster))

    def _begin(self, name: str) -> None:
        """Start one, where the fewest are."""
        used = [shard.place for shard in self._shards.values()]
        place = min(self._places, key=used.count)
        order = Order(
            name=name, folder=str(self._folder.path / "shards" / name), shards=self._roster.first,
            consistency=_consistency(self._strategy), num_lanes=self._record["job"]["num_lanes"],
            durability=self._strategy["durability"], host=place.address, key_path=str(self._folder.key_path),
            log_path=str(self._folder.log_path(name)),
        )  # fmt: skip
        self._shards[name] = _Shard(order, place, ShardProcess(order, place.words, self._folder.log_path(name)))

    @property
    def addresses(self) -> dict[str, str] | None:
        """Where they listen, once all of them do, and hold what they should."""
        return self._listening if self._is_settled else None

    @property
    def _listening(self) -> dict[str, str] | None:
        found = {name: shard.address for name, shard in self._shards.items()}
        return found if all(found.values()) else None

    def want(self, number: int) -> None:
        """Go on with so many."""
        if number != self._roster.wanted:
            self._roster.wanted = number
            self._write(self._roster)
            self._balanced_at_s = 0.0

    def begun(self) -> None:
        """Workers have begun with them, from the step that the run goes on from: buckets may move now."""
        self._has_begun = True

    def stored(self, step: int) -> None:
        """A version has been stored: who left before it is needed no more."""
        self._stored_step = max(step, self._stored_step)
        for name in [name for name, since in self._leaving.items() if step > since and name in self._shards]:
            del self._leaving[name]
            self._shards.pop(name).child.close()
            self._roster.names.remove(name)
            self._write(self._roster)
            self._said.append(f"shard {name} has ended: the others hold all buckets")
            self._tell_all()

    def look(self) -> list[str]:
        """See to them, and replace those that have ended: what there is to say of it. ``ShoalError`` for one that ends
        again and again before it listens, and where what they hold is not what was stored."""
        has_news = False
        for name, shard in self._shards.items():
            address = shard.child.look()
            if address and (shard.num_failures or not shard.address):
                shard.address, shard.num_failures, has_news = address, 0, True
            is_silent = shard.child.silent_s > (self._silent_s if address else _START_S)
            if is_silent:
                shard.child.kill()
            code = shard.child.exit_code
            if code is not None:
                how = f"killed by signal {-code}" if code < 0 else f"exited with {code}"
                how = "was silent, and is killed" if is_silent else how
                self._said.append(f"shard {name} {how}; another takes its place")
                self._replace(name, shard)
        if self._listening is not None:
            if has_news:
                self._tell_all()
            self._spread(self._listening)
            if time.monotonic() > self._spares_from_s:
                self._keep_spares()
        said, self._said = self._said, []
        return said

    def _tell_all(self) -> None:
        if self._listening is not None:
            for shard in self._shards.values():
                shard.child.tell(self._listening)

    # Which buckets they hold

    def _spread(self, addresses: Mapping[str, str]) -> None:
        if self._spreading is not None:
            if not self._spreading.is_alive():
                self._have_spread(self._spreading)
                self._spreading = None
            return
        key = JobKey.read(self._folder.key_path)
        staying = [name for name in self._shards if name not in self._leaving]
        if not self._is_settled:
            self._start_spreading(Spreading(key, staying, addresses, since=self._since))
        elif not (self._has_begun and self._stored_step):
            return  # a move that is cut off is undone by going on from a version
        elif len(staying) < self._roster.wanted:
            name = self._roster.next_name()
            self._roster.names.append(name)
            self._write(self._roster)
            self._begin(name)
            self._balanced_at_s = 0.0
        elif time.monotonic() > self._balanced_at_s + _BALANCE_S:
            names = staying[: self._roster.wanted]
            self._start_spreading(Spreading(key, names, addresses, by_load=set(names) == self._spread_over))

    def _start_spreading(self, spreading: Spreading) -> None:
        self._spreading = spreading
        spreading.start()

    def _have_spread(self, done: Spreading) -> None:
        self._said += done.said
        self._balanced_at_s = time.monotonic()
        if done.error is not None:
            if done.is_torn or not self._is_settled:
                raise done.error
            self._said.append(f"buckets could not be moved: {done.error}")
        elif done.is_done:
            self._is_settled = True
            self._spread_over = set(done.names)
            for name in self._shards.keys() - self._spread_over:
                self._leaving.setdefault(name, max(done.marked, self._stored_step))

    # Those that end

    def _replace(self, name: str, shard: _Shard) -> None:
        shard.num_failures += 1
        if shard.num_failures >= _MOST_FAILURES:
            raise ShoalError(f"shard {name} does not start; {self._folder.log_path(name)} ends: {self._last(name)}")
        shard.child.ended()
        port = int(shard.address.rpartition(":")[2] or 0)
        if shard.num_failures > 1:
            time.sleep(_PAUSE_S)  # its port may be free then
        if shard.num_failures > 2 and self._has_copies:
            shard.place = self._places[(self._places.index(shard.place) + 1) % len(self._places)]
            port = 0
        order = msgspec.structs.replace(shard.order, host=shard.place.address, port=port)
        spare = self._spares.pop(shard.place, None)
        if spare is not None and spare.exit_code is None:
            spare.become(order)
            shard.child = spare
        else:
            shard.child = ShardProcess(order, shard.place.words, self._folder.log_path(name))
        self._spares_from_s = time.monotonic() + _SPARE_AFTER_S  # first the others have the machine

    def _keep_spares(self) -> None:
        for place in {shard.place for shard in self._shards.values()}:
            if place not in self._spares or self._spares[place].exit_code is not None:
                self._spares[place] = ShardProcess(None, place.words, self._folder.log_path("spare"))

    def _last(self, name: str) -> str:
        lines = self._folder.log_path(name).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else "without a word"

    def close(self) -> None:
        """Let them end."""
        if self._spreading is not None:
            self._spreading.join(_END_S)
        children = [*(shard.child for shard in self._shards.values()), *self._spares.values()]
        for child in children:
            child.release()
        for child in children:
            child.close()
