"""One worker's part of one step: forward, roll call, backward with the exchange under way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.comm.collectives import Group, Work
from shoal.job import Batch, Job
from shoal.lanes import Ledger, Span
from shoal.membership import Lanes
from shoal.sources import LocalBatch, count_samples, to_device
from shoal.strategies import Agreed, Share
from shoal.training.kit import Kit
from shoal.training.replica import check_loss, seed_everything, step_seed
from shoal.training.rollcall import Call, Roll, decode, encode


@dataclass(frozen=True)
class Ballot:
    """What this worker has to say in a step's roll call besides its samples: see ``Call``."""

    order: int
    fingerprint: str


@dataclass(frozen=True)
class Part:
    """This worker's part of a step among all members' parts."""

    share: Share
    first_lane: int


def part_of(span: Span, members: Sequence[str], lanes: Lanes, name: str) -> Part:
    """How a step's samples fall to ``name``: its fraction, and whether it is the first member that has any."""
    counts = span.stops - span.starts
    held = {member: int(counts[list(lanes.get(member, ()))].sum()) for member in members}
    leader = next(member for member in members if held[member])
    own = lanes.get(name, ())
    return Part(Share(held[name] / span.num_samples, leader == name), own[0] if own else 0)


class Computer:
    """Takes a worker's part of one step after another, among one group."""

    def __init__(self, kit: Kit, group: Group) -> None:
        self._kit = kit
        self._job = kit.job
        self._group = group

    def run(self, local: LocalBatch, total: int, part: Part, ballot: Ballot) -> tuple[Agreed, Roll]:
        """Compute, and agree with the others. ``total`` counts the step's samples over all members.

        Once this returns every member has contributed all of its part; nothing is committed yet.
        """
        job, replica, group = self._job, self._kit.replica, self._group
        self._kit.agent.at("compute", step=local.step)
        seed_everything(step_seed(job.seed, local.step, part.first_lane))
        replica.reducer.begin(group)
        work, summed = self._forward_and_backward(local, total, ballot)
        self._kit.agent.at("wait")
        agreed = replica.reducer.finish(part.share)
        work.wait()
        return agreed, decode(summed)

    def _forward_and_backward(self, local: LocalBatch, total: int, ballot: Ballot) -> tuple[Work, Tensor]:
        loss_sum, bad = 0.0, False
        for position, batch in enumerate(local.batches):
            num_samples = count_samples(batch)
            loss = loss_of(self._job, self._kit.replica.model, batch)
            value = float(loss.detach())
            bad = bad or not math.isfinite(value)
            loss_sum += 0.0 if bad else value * num_samples
            if position == len(local.batches) - 1:
                answer = self._call(Call(local.ledger, loss_sum, bad, ballot.order, ballot.fingerprint))
                self._kit.replica.reducer.arm()
            if not bad:
                (loss if num_samples == total else loss * (num_samples / total)).backward()  # type: ignore[no-untyped-call]
        if not local.batches:
            answer = self._call(Call(Ledger(), 0.0, False, ballot.order, ballot.fingerprint))
        return answer

    def _call(self, call: Call) -> tuple[Work, Tensor]:
        tensor = encode(call).to(self._job.device)
        return self._group.all_reduce(tensor), tensor

    def roll_call(self, call: Call) -> Roll:
        """A roll call without a step."""
        self._kit.agent.at("wait")
        work, summed = self._call(call)
        work.wait()
        return decode(summed)


def loss_of(job: Job, model: torch.nn.Module, batch: Batch) -> Tensor:
    """The task's loss on a batch, on the job's device and in its precision."""
    with torch.autocast(job.device, dtype=torch.bfloat16, enabled=job.precision == "bf16"):
        loss = job.task.loss(model, to_device(batch, job.device))
    check_loss(loss)
    return loss


def find_bad_lane(kit: Kit, span: Span, lanes: tuple[int, ...]) -> int | None:
    """The first of these lanes whose samples in this step give a loss or a gradient that is not finite."""
    order = kit.order_of_epoch(span.epoch)
    counts = np.asarray(span.stops) - np.asarray(span.starts)
    parameters = [p for p in kit.replica.model.parameters() if p.requires_grad]
    for lane in (lane for lane in lanes if counts[lane]):
        batch = kit.train_reader.gather(order.slice(lane, int(span.starts[lane]), int(span.stops[lane])))
        loss = loss_of(kit.job, kit.replica.model, batch)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (loss, *gradients)):
            return lane
    return None
