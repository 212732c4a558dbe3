"""Rounds of local steps: a worker's part of them, and the exchange at their end.

A round survives the generation in which it began. What a worker has done of it stays with its replica while the version
that it began from is the newest; so survivors of a fault go on where they are, and the round commits what they did. The
lanes of who was lost go on from their committed cursors: in the next round their hosts take, step by step, what they
missed besides what is due. Only the last round of all waits until every lane is done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from shoal.errors import Bug
from shoal.lanes import Ledger
from shoal.lanes.hashing import Indices
from shoal.membership import Lanes
from shoal.sources import LocalBatch, Prefetch, count_samples
from shoal.strategies import Agreed, Rounds, Share
from shoal.training.computing import Ballot, Scene, find_bad_lane, loss_of
from shoal.training.replica import seed_everything, step_seed
from shoal.training.rollcall import NUM_ENTRIES, Roll, decode, encode
from shoal.training.round import Progress, Round, expected, feeds, first_of_slot

_ASK_AGAIN, _ASK_S = 25, 0.002
"""How often, and how long after, an order is asked for again that has reached only some: the next chance to obey it is
a round away."""


class LocalComputer:
    """Takes a worker's part of one round after another. With ``overlap_steps`` a round's exchange is under way while
    the first of the next round's steps are made."""

    def __init__(self, scene: Scene, first_step: int) -> None:
        self._scene = scene
        self._kit = scene.kit
        self._job = scene.kit.job
        self._replica = scene.kit.replica
        self._base = first_step
        self._lanes: tuple[int, ...] = ()
        self._feeds: dict[int, _Feed] = {}
        session = scene.kit.replica.session
        assert isinstance(session, Rounds)
        self._session = session

    def deal(self, lanes: Lanes) -> None:
        self._lanes = tuple(lanes.get(self._scene.name, ()))

    def close(self) -> None:
        for feed in self._feeds.values():
            feed.close()
        self._feeds = {}

    def drain(self) -> Iterator[Round]:
        """Nothing is under way between two rounds, once the earlier one is committed."""
        return iter(())

    def advance(self, last_step: int) -> Round:
        progress = self._progress(last_step)
        self._run(progress, progress.num_slots)
        ballot = self._scene.ballot(progress.target)
        roll, flags, num_contributors = self._call(progress, ballot)
        for _ in range(_ASK_AGAIN):
            if roll.order or not roll.some_ordered or roll.num_bad:
                break
            time.sleep(_ASK_S)
            ballot = replace(ballot, order=self._kit.agent.order)
            roll, flags, num_contributors = self._call(progress, ballot)
        version = progress.target
        while version == self._kit.steps.total_steps and not flags.all() and not roll.num_bad:
            missing = tuple(lane for lane in self._lanes if not flags[lane])
            progress.stages += [missing] if missing else []
            self._run(progress, progress.num_slots)
            roll, flags, num_contributors = self._call(progress, ballot)
        done = Round(version, self._base, self._kit.steps.locate(version - 1)[0], Agreed([], []), roll, ballot.order,
                     flags.numpy(), num_contributors)  # fmt: skip
        if roll.num_bad:
            return done
        try:
            return replace(done, agreed=self._exchange(progress, done, last_step))
        except BaseException:
            if self._replica.progress is not progress:
                self._replica.progress, self._replica.ahead = progress, self._replica.progress
            raise

    def _exchange(self, progress: Progress, done: Round, last_step: int) -> Agreed:
        """What all have agreed on. The next round may begin meanwhile, if it takes place as this one does."""
        assert done.flags is not None
        share = Share(progress.ledger.count / done.roll.ledger.count, self._leads(done.flags, progress))
        upcoming = None
        settled = not done.roll.order and not done.roll.due and done.version < last_step
        if settled and progress.stages and self._session.overlap_steps:
            upcoming = self._upcoming(progress, done, last_step)
        if upcoming is None or upcoming is not self._replica.ahead:
            self._session.rewind()
        if upcoming is not None:
            self._replica.progress = upcoming
        self._replica.ahead = None
        self._session.launch(self._scene.group, share, done.version, goes_on=upcoming is not None)
        self._base = done.version
        if upcoming is not None:
            self._overlap(upcoming)
        self._kit.agent.at("wait")
        return self._session.finish()

    def _upcoming(self, progress: Progress, done: Round, last_step: int) -> Progress | None:
        """The round after one that is not committed yet, if it may begin: a fresh one, or what was made of it before a
        fault, as long as the lanes are still this worker's. None where lanes lag, for orders come soon after a fault,
        and what is made on top of a round whose end brings an order is given up."""
        lagging = done.lagging_after(progress.base, self._replica.lagging)
        fresh = self._fresh(done.version, last_step, lagging)
        ahead = self._replica.ahead
        if ahead is not None and ahead.fits(fresh.num_slots, set(self._lanes) & set(progress.lanes_done)):
            ahead.lead_to(fresh.target)
            return ahead
        return None if lagging else fresh

    def _leads(self, flags: Indices, progress: Progress) -> bool:
        """Whether this worker did the first of all lanes that were done."""
        return int(np.flatnonzero(flags)[0]) in progress.lanes_done

    # A round

    def _progress(self, last_step: int) -> Progress:
        """What is done of the round from the version that the group holds; nothing so far, unless a replica knows."""
        found = self._replica.progress
        if found is None or found.base != self._base:
            if self._replica.step != self._base:  # it is catching up, and has no lanes
                return replace(self._fresh(self._base, last_step, {}), stages=[])
            found = self._replica.progress = self._fresh(self._base, last_step, self._replica.lagging)
        return found

    def _fresh(self, base: int, last_step: int, lagging: Mapping[int, int]) -> Progress:
        """A round of which nothing is done. One that makes up for lost lanes is half as long, for it has more work
        a step and a newcomer waits for its end; but what was made of it during an exchange that failed still fits in.
        How long it is depends on the version that it begins from alone."""
        every = self._session.sync_every_steps
        shorter = max(1, every // 2, self._session.overlap_steps)
        target = min(base + (shorter if lagging else every), last_step)
        return Progress(base, target, [self._lanes] if self._lanes else [], lagging=lagging)

    def _run(self, progress: Progress, upto_slot: int) -> None:
        """Make the local steps that are left, at most up to a slot of the present stage."""
        while not progress.is_done:
            if progress.slot >= upto_slot:
                return
            batch = self._take(progress)
            self._scene.group.check()
            self._local_step(progress, batch)

    def _overlap(self, progress: Progress) -> None:
        """Begin a round while the exchange of the one before goes through its stages, spread over the first steps: what
        is on the wire after all but the last of them has steps to travel behind."""
        num_waits = self._session.num_stages - 1
        for stage in range(num_waits):
            self._session.advance(stage + 1)
            self._run(progress, self._session.overlap_steps * (stage + 1) // num_waits)

    def _take(self, progress: Progress) -> LocalBatch:
        """All that this worker's lanes have for the present slot."""
        lanes = progress.stages[progress.stage]
        parts = []
        for reached, own in feeds(lanes, progress.base, progress.lagging).items():
            first = first_of_slot(progress.slot, reached, progress)
            last = first_of_slot(progress.slot + 1, reached, progress)
            feed = self._feeds.get(reached - progress.base)
            if feed is None or not feed.stands_at(own, first):
                if feed is not None:
                    feed.close()
                feed = self._feeds[reached - progress.base] = _Feed(self._scene, own, first)
            parts += feed.take(last)
        return _together(progress.base + progress.slot, parts)

    def _local_step(self, progress: Progress, local: LocalBatch) -> None:
        """An optimizer step of this worker's own."""
        kit, step = self._kit, progress.base + progress.slot
        kit.agent.at("compute", step=self._replica.step)
        with self._scene.meter.computing(local.num_samples, self._session.times):
            seed_everything(step_seed(self._job.seed, step, progress.stages[progress.stage][0]))
            self._replica.optimizer.zero_grad(set_to_none=True)
            for batch in local.batches:
                num_samples = count_samples(batch)
                loss = loss_of(self._job, self._replica.model, batch)
                value = float(loss.detach())
                if not math.isfinite(value):
                    progress.bad_step = step
                    return
                progress.loss_sum += value * num_samples
                (loss * (num_samples / local.num_samples)).backward()  # type: ignore[no-untyped-call]
            if local.num_samples:
                self._replica.update(step)
        progress.ledger = progress.ledger + local.ledger
        progress.next_slot()

    # Its end

    def _call(self, progress: Progress, ballot: Ballot) -> tuple[Roll, torch.Tensor, int]:
        """The roll call of a round: what all did, lane by lane, and how many workers did any of it.

        Who is catching up does not know how long the round is, and is told by the sum of what the others know.
        """
        self._kit.agent.at("wait")
        bad = progress.bad_step is not None
        entries = encode(ballot.call(progress.ledger, progress.loss_sum, bad=bad))
        num_lanes, knows = self._job.num_lanes, self._replica.step == progress.base
        tail = torch.zeros(num_lanes + 3, dtype=torch.float64)
        tail[list(progress.lanes_done)] = 1
        tail[num_lanes:] = torch.tensor([bool(progress.ledger.count), knows, knows * progress.num_slots])
        summed = torch.cat([entries, tail]).to(self._job.device)
        self._session.times.await_(self._scene.group.all_reduce(summed))
        summed = summed.cpu()
        roll = decode(summed[:NUM_ENTRIES])
        flags = summed[NUM_ENTRIES:-3].long()
        num_contributors, num_knowing, num_slots = (int(entry) for entry in summed[-3:])
        if not knows:
            progress.target = progress.base + num_slots // num_knowing
        elif not roll.num_bad:
            wanted = expected(self._kit.steps, flags.numpy(), progress.base, progress.target, self._replica.lagging)
            if roll.ledger != wanted:
                raise Bug(f"a round from step {progress.base} took {roll.ledger.count} samples, and not {wanted.count}")
        return roll, flags, num_contributors

    def find_bad_lane(self) -> int | None:
        progress = self._replica.progress
        if progress is None or progress.bad_step is None:
            return None
        return find_bad_lane(self._kit, progress.bad_step, progress.stages[progress.stage])


class _Feed:
    """Lanes that stand at one step, read ahead."""

    def __init__(self, scene: Scene, lanes: tuple[int, ...], step: int) -> None:
        self._lanes, self._step = lanes, step
        kit = scene.kit
        self._loader = Prefetch(
            kit.train_reader, kit.order_of_epoch, kit.steps, lanes, first_step=step, micro_batch=kit.job.micro_batch
        )

    def stands_at(self, lanes: tuple[int, ...], step: int) -> bool:
        return (self._lanes, self._step) == (lanes, step)

    def take(self, last: int) -> list[LocalBatch]:
        """The steps up to ``last``."""
        found = [next(self._loader) for _ in range(self._step, last)]
        self._step = last
        return found

    def close(self) -> None:
        self._loader.close()


def _together(step: int, parts: list[LocalBatch]) -> LocalBatch:
    """Several batches as one, in pieces."""
    ledger = Ledger()
    for part in parts:
        ledger = ledger + part.ledger
    batches = [batch for part in parts for batch in part.batches]
    return LocalBatch(step, 0, sum(part.num_samples for part in parts), batches, ledger)
