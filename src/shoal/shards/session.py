"""A worker's part of a run with tables: where its embeddings' rows come from, and where their gradients go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from shoal.errors import Diverged, StoreFault
from shoal.shards.client import Client, Pushing
from shoal.shards.embedding import embeddings_of, parts_of, specs_of
from shoal.shards.foresight import Batch, Foresight
from shoal.tables import TableSpec
from shoal.tables.frame import Part, Push


class TableSession:
    """Serves the embeddings of ``model`` from shards. ``step`` is the one that pulls are for. One push at a time:
    ``push`` what backward left, ``settle``, and go on; or several: ``send``, and ``settled``."""

    def __init__(
        self, model: nn.Module, client: Client, specs: Sequence[TableSpec] = (),
        event_time_s: Callable[[Any], int] = lambda _: 0,
    ) -> None:  # fmt: skip
        """``specs``: tables besides those of the model's embeddings. ``event_time_s``: of a batch."""
        self.step = 0
        self._event_time_s, self._now_s = event_time_s, 0
        self._modules = embeddings_of(model)
        self._specs = [*specs_of(self._modules), *specs]
        self._client = client
        self._pushing: Pushing | None = None
        self._is_open = False
        self._generation = 0
        self._foresight = Foresight(
            lambda table, ids, step: client.ask(table, ids, step, early=True), client.rows, client.drop
        )
        for module in self._modules:
            module.source, module.foresight = self, self._foresight

    def meet(self, shards: Mapping[str, str]) -> None:
        """The shards are found there from now on."""
        for name, address in shards.items():
            self._client.meet(name, address)

    def begin(self, generation: int, base: int, check: Callable[[], None]) -> None:
        """Take part in a generation from step ``base`` on, where the shards then stand; -1: wherever they stand.
        ``check`` is called while shards are waited for, and may raise. ``Fault`` if they cannot stand there."""
        self._client.check = check
        self._foresight.clear()
        if not self._is_open:
            self._client.open(self._specs)
            self._is_open = True
        self._pushing, self._generation, self.step = None, generation, base
        self._client.begin(generation, base)
        parts_of(self._modules)  # what an interrupted step has left

    def check_reach(self, step: int) -> None:
        """``StoreFault`` if a shard stands before a step that is stored: what it had is gone."""
        for name, standing in self._client.standings().items():
            if standing.step < step:
                raise StoreFault(
                    f"shard {name} stands at step {standing.step}, and version {step} is stored; its folder or log is "
                    "gone or damaged"
                )

    def take_up(self, batches: Sequence[Batch], step: int) -> None:
        """A step begins, with these."""
        self.step = step
        self._foresight.begin(batches, step)
        self._now_s = max((self._event_time_s(batch) for batch in batches), default=0)

    def look_ahead(self, batches: Sequence[Batch], step: int) -> None:
        """That step is going to come, with these: begin to pull what it needs."""
        self._foresight.look(batches, step)

    def pull(self, table: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return self._client.pull(table, ids, self.step)

    def push(self, lanes: Sequence[int], *, keep: bool = True) -> None:
        """Send this step's gradients of these lanes; ``keep=False``: none, for they are no numbers."""
        if lanes and keep:
            self._pushing = self.send(lanes)
        elif lanes:
            parts_of(self._modules)
            self._pushing = self._send(lanes, [])

    def send(self, lanes: Sequence[int], more: Sequence[Part] = ()) -> Pushing:
        """Send this step's gradients of these lanes, and ``more``; ``settled`` waits for it."""
        return self._send(lanes, [*parts_of(self._modules), *more])

    def _send(self, lanes: Sequence[int], parts: Sequence[Part]) -> Pushing:
        return self._client.send(
            Push(self._generation, dict.fromkeys(lanes, (self.step, self.step + 1)), parts, self._now_s)
        )

    def settled(self, pushing: Pushing) -> None:
        """Wait until all shards have what was sent. ``Diverged`` and other faults if they refuse it."""
        self._client.settle(pushing)

    def steps_done(self, lanes: Sequence[int]) -> dict[int, list[int]]:
        """How many steps of each of these lanes each journal of each shard has taken."""
        books = [book for standing in self._client.standings().values() for book in standing.books]
        return {lane: [book.get(lane, 0) for book in books] for lane in lanes}

    def settle(self) -> Diverged | None:
        """Wait until the shards have this step's: what they refuse it for, if it is not finite. ``Fault``."""
        pushing, self._pushing = self._pushing, None
        try:
            if pushing is not None:
                self.settled(pushing)
        except Diverged as error:
            return error
        return None

    def mark(self, step: int, keep: Collection[int]) -> None:
        """Have the shards remember step ``step``, and those of ``keep``."""
        self._client.mark(step, keep)

    def figures(self) -> dict[str, Any]:
        """What each shard tells of itself."""
        return {
            name: {"step": standing.step, **standing.figures} for name, standing in self._client.standings().items()
        }  # fmt: skip

    def close(self) -> None:
        self._client.close()
