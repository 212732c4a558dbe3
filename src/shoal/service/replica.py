"""A model's process, as its service sees it: begun, told to load a model, asked, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from shoal.errors import ConfigError, Fault
from shoal.service import wire
from shoal.serving.answering import Served
from shoal.serving.batching import Batching, Done, Lost
from shoal.serving.datatypes import Arrays, as_tensors
from shoal.serving.package import Probe

_BEGIN_S = 60.0
_END_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Loading:
    """``command``: what begins a model's process, but for its two descriptors: its socket, and one that closes with
    the service. ``most_s``: how long a model may take to load, ``compute_s``: for a batch; a process that takes longer
    is ended, for it is frozen or stuck. ``num_threads``: torch's, for each process. ``batching``: for how large batches
    it gets ready."""

    command: Sequence[str]
    most_s: float = 120.0
    compute_s: float = 60.0
    num_threads: int = 1
    batching: Batching = field(default_factory=Batching)


@dataclass(frozen=True)
class Held:
    """What a process holds: the model, its probe, and what ``wire.Loaded`` says besides."""

    served: Served
    probe: Probe
    by_delta: bool
    stored_s: float | None


class Replica:
    """One process. It ends with the service, however that ends; signals of a terminal or an init are the service's."""

    def __init__(self, process: asyncio.subprocess.Process, link: wire.Link, lifeline: int, loading: Loading) -> None:
        self._process = process
        self._link = link
        self._lifeline = lifeline
        self._loading = loading
        self._source: wire.Source | None = None
        self.has_held = False
        """Whether it has answered with a version of its source: the next one of it needs less, then."""

    @classmethod
    async def begin(cls, loading: Loading) -> Replica:
        """A process without a model. ``Fault`` if it does not come up."""
        ours, theirs = socket.socketpair()
        lifeline, lifeline_end = os.pipe()
        fds = (theirs.fileno(), lifeline)
        try:
            process = await asyncio.create_subprocess_exec(
                *loading.command, *map(str, fds), pass_fds=fds, stdin=asyncio.subprocess.DEVNULL
            )
        except BaseException:  # what may have begun ends with its lifeline
            os.close(lifeline_end)
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        ours.setblocking(False)
        _, link = await asyncio.get_running_loop().create_connection(wire.Link, sock=ours)
        replica = cls(process, link, lifeline_end, loading)
        try:
            async with asyncio.timeout(_BEGIN_S):
                await link.expect()
        except asyncio.CancelledError:
            await replica.end(at_once=True)
            raise
        except (TimeoutError, Lost) as error:
            await replica.end(at_once=True)
            why = "has ended" if isinstance(error, Lost) else f"has not come up within {_BEGIN_S} s"
            raise Fault(f"a process for a model {why}; its output above says why") from error
        return replica

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def source(self) -> wire.Source | None:
        """What it was told to load last."""
        return self._source

    @property
    def closed(self) -> asyncio.Future[None]:
        """Done once the process can do no more."""
        return self._link.closed

    depth: ClassVar[int] = 2
    """As ``Runner``."""

    @property
    def is_busy(self) -> bool:
        """Whether it is at something, or stuck in it."""
        return self._link.num_asked > 0

    async def load(self, source: wire.Source) -> Held:
        """Have it answer with a model. ``ConfigError`` or ``Fault``, with the process's reason, if it cannot; ``Lost``
        if it ended over it. One that takes too long is ended."""
        self._source = source
        try:
            async with asyncio.timeout(self._loading.most_s):
                bounds = self._loading.batching
                asked = wire.Load(source, self._loading.num_threads, bounds.max_samples, bounds.max_batch_s)
                told, arrays = await self._link.ask(asked)
        except TimeoutError:
            await self.end(at_once=True)
            raise Fault(
                f"the model was not loaded within {self._loading.most_s} s; give it more time, or make it smaller"
            ) from None
        match told:
            case wire.Loaded():
                self.has_held = True
                served = Served(told.name, told.version, wire.specs(told.inputs), wire.specs(told.outputs))
                tensors = as_tensors(arrays)
                parts = ({n[len(p) :]: t for n, t in tensors.items() if n.startswith(p)} for p in ("input/", "output/"))
                return Held(served, Probe(*parts), told.by_delta, told.stored_s)
            case _:
                raise _error(told)

    async def prepare(self, source: wire.Source) -> None:
        """Have it do what can be done before a version is known: load the job's code and data. ``ConfigError`` or
        ``Fault`` if that fails, ``Lost`` if it ended over it."""
        self._source = source
        async with asyncio.timeout(self._loading.most_s):
            told, _ = await self._link.ask(wire.Prepare(source))
        if not isinstance(told, wire.Ready):
            raise _error(told)

    def start(self, inputs: Arrays) -> asyncio.Future[Done]:
        """As ``Runner``."""
        most_s = self._loading.compute_s * (1 + self._link.num_asked)
        answer: asyncio.Future[Done] = asyncio.get_running_loop().create_future()

        stuck = asyncio.get_running_loop().call_later(most_s, self.kill)

        def tell(asked: asyncio.Future[wire.Outcome]) -> None:
            stuck.cancel()
            if answer.done():
                return
            if (error := asked.exception()) is not None:
                answer.set_exception(error)
                return
            told, outputs = asked.result()
            if isinstance(told, wire.Computed):
                answer.set_result(Done(outputs, told.took_s))
            else:
                answer.set_exception(_error(told))

        self._link.ask(wire.Compute(), inputs).add_done_callback(tell)
        return answer

    async def measure(self) -> dict[str, Any]:
        """Metrics of its model on the job's test data; none if it has none. ``Fault`` if that fails. However long it
        takes: who gives up must end the process, which is at nothing else meanwhile."""
        told, _ = await self._link.ask(wire.Measure())
        if not isinstance(told, wire.Measured):
            raise _error(told)
        return told.figures

    async def end(self, *, at_once: bool = False) -> None:
        """End the process: after what it computes, or within 5 s, or at once."""
        self._link.close()
        if at_once:
            self.kill()
        try:
            async with asyncio.timeout(_END_S):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def kill(self) -> None:
        """End the process now, without awaiting that."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def _error(told: wire.Message) -> Exception:
    if isinstance(told, wire.Failed):
        return ConfigError(told.reason) if told.is_config else Fault(told.reason)
    return Fault(f"a model's process answered {type(told).__name__}")
