"""A worker: builds its replica, joins the run, takes part in one generation after another until it is told to end."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from shoal.comm import messages as msg
from shoal.comm.reach import unreachable
from shoal.comm.transfer import Offerer
from shoal.errors import Behind, ConfigError, Diverged, Fault, Halted, ShoalError, StoreFault
from shoal.job import Job, Timed
from shoal.membership import NOTHING, Origin, World
from shoal.strategies import Hybrid, ParameterServer, Served
from shoal.tables.buckets import BucketMap
from shoal.training.agent import Agent
from shoal.training.generations import Generations
from shoal.training.kit import Assignment, Kit, plan_steps
from shoal.training.member import Member
from shoal.training.replica import Replica
from shoal.versions import BackgroundWriter, Versions
from shoal.versions.store import Store

if TYPE_CHECKING:
    from shoal.shards.session import TableSession

_PROBE_S = 0.5


def identity(assignment: Assignment, transfer_address: str) -> msg.Identity:
    """What this process runs, and where it is found."""
    return msg.Identity(
        shoal=version("shoal"),
        torch=str(torch.__version__),
        job_hash=assignment.job_hash,
        host=assignment.host,
        pid=os.getpid(),
        transfer_address=transfer_address,
    )


class Worker:
    """A plain class; launchers run it in a process of its own. ``leave`` may be called from a signal handler."""

    def __init__(self, job: Job, assignment: Assignment) -> None:
        if job.num_threads is not None:
            torch.set_num_threads(job.num_threads)
        self._generation = 0
        self._tables: TableSession | None = None
        self._generations = Generations(Store(assignment.store))
        offerer = Offerer(assignment.host, assignment.key)
        known = identity(assignment, offerer.address)
        self._kit = Kit(
            job=job,
            assignment=assignment,
            agent=Agent(assignment.address, assignment.key, assignment.name, known, job.patience.stuck_s),
            offerer=offerer,
            replica=Replica(job),
            steps=plan_steps(job),
            versions=Versions(Store(assignment.store), job.storing.keep_last, job.storing.keep_every_steps),
        )

    @property
    def took_part(self) -> bool:
        """Whether this worker has been a member of any generation."""
        return self._generation > 0

    def leave(self) -> None:
        """Hand the lanes back at the next boundary, and end."""
        self._kit.agent.leave()

    def run(self) -> msg.Ended | msg.Dismissed:
        """Work until the run ends or this worker is dismissed."""
        agent = self._kit.agent
        agent.start()
        previous: Member | None = None
        try:
            while True:
                agent.at("rest")
                summons = agent.next_summons()
                if previous is not None and previous.group is not None:
                    previous.group.close()
                if not isinstance(summons, msg.Enter):
                    return summons
                if previous is None:
                    self._check_store(summons.world.generation)
                previous = self._take_part(summons)
        finally:
            if "_writer" in self.__dict__:
                self._writer.close()
            if self._tables is not None:
                self._tables.close()
            agent.close()
            self._kit.offerer.close()

    def _check_store(self, generation: int) -> None:
        """A worker on another machine must see the run's store, not a folder of the same name."""
        url = self._kit.assignment.store
        if not self._generations.holds(generation):
            raise ConfigError(
                f"the run's store {url} cannot be seen from {self._kit.assignment.host}: start the run with --store "
                "and a folder or URL that every machine sees"
            )

    @cached_property
    def _writer(self) -> BackgroundWriter:
        return BackgroundWriter(self._kit.versions, self._check_newest)

    def _check_newest(self) -> None:
        """A leader that was given up, and does not know it yet, must not store what the others went on without."""
        newest = self._generations.newest_number()
        if newest > self._generation:
            raise StoreFault(f"generation {newest} has begun without this worker, which is of {self._generation}")

    def _take_part(self, enter: msg.Enter) -> Member:
        kit, generation = self._kit, enter.world.generation
        self._generation = generation
        member = Member(kit, enter, lambda: self._writer, self._tables_at(enter.shards))
        try:
            member.run()
        except Diverged as error:
            if isinstance(kit.replica.session, Served):  # the others do not know of it
                self._close(member)
                self._fail(member, error)
            else:
                self._stop_diverged(member, generation, error)
        except StoreFault as error:
            self._close(member)
            self._fail(member, error)
        except Behind as error:
            self._close(member)
            self._fall_back(member, enter.world, error)
        except Fault as error:
            self._close(member)
            cut = self._who_is_cut(enter, error)
            kit.agent.report(generation, kit.replica.standing(), cut, str(error))
        except Exception as error:  # noqa: BLE001 - the run fails, and says with what
            self._close(member)
            self._fail(member, error)
        else:
            if member.paused:
                kit.agent.report(generation, kit.replica.standing(), frozenset(), "paused")
            else:
                kit.agent.rest(generation, kit.replica.standing())
        return member

    def _tables_at(self, shards: Mapping[str, str]) -> TableSession | None:
        """The run's tables, if it has any."""
        strategy = self._kit.job.strategy
        if self._tables is None and isinstance(strategy, Hybrid | ParameterServer):
            from shoal.shards.client import Client, Manner
            from shoal.shards.session import TableSession

            replica, own = self._kit.replica, self._kit.assignment
            buckets = replace(BucketMap.even(list(shards)), epoch=0)  # the shards know which is the one of now
            manner = Manner(
                patience_s=self._kit.job.patience.stuck_s, half=strategy.half, waits=not isinstance(strategy, Hybrid)
            )
            client = Client(own.key, buckets, shards, own.name, manner)
            dense = replica.session.specs if isinstance(replica.session, Served) else []
            task = self._kit.job.task
            times = (task.event_time_s,) if isinstance(task, Timed) else ()
            self._tables = TableSession(replica.model, client, dense, *times)
        elif self._tables is not None:
            self._tables.meet(shards)
        return self._tables

    def _fall_back(self, member: Member, world: World, error: Behind) -> None:
        """The tables have lost what came after the version that was stored last: all go back to it. If they cannot
        stand there either, the run ends."""
        if world.origin is not Origin.PEERS and not member.has_begun:
            self._fail(member, StoreFault(f"{error}, which is what is stored; its folder or log is gone or damaged"))
            return
        self._kit.replica.forget()
        self._kit.agent.note("fell_back", worker=self._kit.assignment.name, step=world.base.step, reason=str(error))
        self._kit.agent.report(world.generation, NOTHING, frozenset(), str(error))

    def _close(self, member: Member) -> None:
        """At once, so that the others' collectives fail too and they need not wait to be told."""
        if member.group is not None:
            member.group.close()

    def _who_is_cut(self, enter: msg.Enter, error: Fault) -> frozenset[str]:
        order = self._kit.agent.order
        if isinstance(error, Halted) and not (isinstance(order, msg.Pause) and order.probe):
            return frozenset()
        own = self._kit.assignment.name
        return unreachable({w: a for w, a in enter.addresses.items() if w != own}, _PROBE_S)

    def _stop_diverged(self, member: Member, generation: int, error: Diverged) -> None:
        """The leader stores what is good; who caused it tells which lane did."""
        member.store_last_good()
        try:
            reason = member.name_culprit(error)
        except Fault:  # another member is gone: who did it stays unknown
            reason = str(error)
        if reason is not None:
            self._kit.agent.send(msg.Failed(kind="Diverged", reason=reason))
        self._kit.agent.rest(generation, self._kit.replica.standing())

    def _fail(self, member: Member, error: Exception) -> None:
        """The job's own code, its data or its store failed, and would fail on any worker."""
        name = self._kit.assignment.name
        self._kit.agent.note("failed", error="".join(traceback.format_exception(error)))
        where = "" if isinstance(error, ShoalError) else f"{type(error).__name__} in {_place(error)}: "
        reason = f"{where}{error} (worker {name}, step {member.step})"
        self._kit.agent.send(msg.Failed(kind=type(error).__name__, reason=reason))


def _place(error: Exception) -> str:
    """The innermost line of the traceback that is not in a library."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and f"{os.sep}shoal{os.sep}" not in f.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"
