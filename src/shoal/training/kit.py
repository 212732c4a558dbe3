"""What a worker has, whatever the generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from shoal.comm.keys import JobKey
from shoal.comm.transfer import Offerer
from shoal.job import Job
from shoal.lanes import Order, Steps
from shoal.sources import Reader
from shoal.training.agent import Agent
from shoal.training.replica import Replica
from shoal.versions import Versions


def plan_steps(job: Job) -> Steps:
    """Which samples each of the job's steps takes."""
    num_samples = sum(job.train.block_sizes())
    return Steps(num_samples, job.global_batch, job.num_lanes, epochs=job.epochs, total_steps=job.steps or 0)


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a launcher tells a worker: its name, where the coordinator is, and what the run is made of.

    ``address`` is the coordinator's host:port; ``store`` the URL of the run's store; ``host`` the address that the
    other workers reach this one at.
    """

    name: str
    address: str
    key: JobKey
    store: str
    job_hash: str
    host: str = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Kit:
    """Shared by all parts of the loop; made once."""

    job: Job
    assignment: Assignment
    agent: Agent
    offerer: Offerer
    replica: Replica
    steps: Steps
    versions: Versions

    @cached_property
    def train_reader(self) -> Reader:
        return self.job.train.open()

    @cached_property
    def test_reader(self) -> Reader | None:
        return self.job.test.open() if self.job.test is not None else None

    @cached_property
    def order_of_epoch(self) -> Callable[[int], Order]:
        """The order of an epoch's samples, by its number."""
        sizes = self.job.train.block_sizes()
        return lru_cache(maxsize=2)(lambda epoch: Order(sizes, self.job.num_lanes, self.job.seed, epoch))
