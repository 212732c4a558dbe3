"""The second stages of a backward pass, beside it."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import Protocol


class Stages(Protocol):
    """An exchange that was started."""

    def turn(self) -> None:
        """Wait for the first stage, begin the second."""
        ...

    def end(self) -> None:
        """Wait for the second stage, and hand over what came of it."""
        ...

    def fail(self, error: Exception) -> None:
        """Hand over an error instead, unless ``end`` has handed over a result."""
        ...


class Backward:
    """One backward pass. A thread turns and ends its exchanges in the order in which they were added.

    The next one is turned before one is ended, so that what is computed for the one hides what is sent for the other;
    and always so, as every member must start the same collectives in the same order.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Stages | None] = SimpleQueue()
        self._added: list[Stages] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="shoal-backward", daemon=True)
        self._thread.start()

    def add(self, exchange: Stages) -> None:
        """Raises what an earlier exchange has failed with."""
        self._added.append(exchange)
        self._raise()
        self._queue.put(exchange)

    def finish(self) -> None:
        """Return when all exchanges have ended. Raises what one has failed with."""
        self.leave()
        self._thread.join()
        self._raise()

    def leave(self) -> None:
        """Let the thread end by itself: no more will be added."""
        self._queue.put(None)

    def _raise(self) -> None:
        if self._error is not None:
            for exchange in self._added:
                exchange.fail(self._error)
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - raised in the thread that runs backward
            self._error = error
            for exchange in list(self._added):
                exchange.fail(error)

    def _work(self) -> None:
        before: Stages | None = None
        while (exchange := self._queue.get()) is not None:
            exchange.turn()
            if before is not None:
                before.end()
            before = exchange
        if before is not None:
            before.end()
