"""One worker's copy of what is trained: model, optimizer, the account of samples, and the step that they stand at."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from shoal.comm.transfer import Parcel
from shoal.errors import ConfigError
from shoal.job import GroupsParameters, Job
from shoal.lanes import Ledger
from shoal.membership import NOTHING, Standing
from shoal.strategies import Reducer, Rounds, Served
from shoal.training.round import Progress, Round
from shoal.versions import Snapshot, capture, fingerprint, restore

_NUM_ACTIVE = "num_active"


class Replica:
    """Built blank (step -1). ``plant``, or ``restore`` a snapshot; then only ``commit`` moves it, a round at a time.

    With a strategy that computes locally, ``model`` is ahead of the version by the local steps of ``progress``.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.step = -1
        self.ledger = Ledger()
        self.lagging: Mapping[int, int] = {}
        """Lanes of which a lost worker's part is still to be done, and the step that they stand at."""
        self.progress: Progress | None = None
        """What this worker has done of a round that is not committed."""
        self.ahead: Progress | None = None
        """And of the round after that one, if a fault has ended its exchange."""
        self._build()

    def _build(self) -> None:
        job = self.job
        seed_everything(job.seed)
        self.model = job.task.model().to(job.device)
        self.optimizer = job.optimizer(self._optimized())
        self.session: Reducer | Rounds | Served = job.strategy.bind(self.model)
        if isinstance(self.session, Served):
            self.session.meet(self.optimizer)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._fingerprint: tuple[int, str] | None = None
        self._pristine = True

    def _optimized(self) -> Any:
        if isinstance(self.job.task, GroupsParameters):
            return self.job.task.parameter_groups(self.model)
        return self.model.parameters()

    @property
    def is_local(self) -> bool:
        """Whether the optimizer is this worker's own, and not a part of what all agree on."""
        return isinstance(self.session, Rounds)

    @property
    def has_private_state(self) -> bool:
        """Whether anything here is this worker's alone, so that a version must be made by all."""
        return self.is_local or self.session.memories.keeps_residuals

    def plant(self) -> None:
        """Stand at step 0: what the job's seed gives."""
        if not self._pristine:
            self._build()
        self.step, self.ledger, self.lagging, self.progress, self.ahead = 0, Ledger(), {}, None, None
        self.session.reset()

    def restore(self, snapshot: Snapshot, num_members: int | None = None) -> None:
        """Stand where the snapshot stands: a stored version, of whose residual each of ``num_members`` takes a part, or
        without that number a peer's copy."""
        self._pristine = False
        self.step = -1
        restore(snapshot, self.model, self.optimizer)
        self.ledger = Ledger(*snapshot.meta["ledger"])
        self.lagging = {int(lane): step for lane, step in snapshot.meta.get("lagging", {}).items()}
        self.progress = self.ahead = None
        self.session.reset()
        self.session.load(snapshot.strategy)
        share = snapshot.meta.get(_NUM_ACTIVE, 1) / num_members if num_members is not None else None
        self.session.memories.load(snapshot.strategy, share)
        self._fingerprint = None
        self.step = snapshot.step

    def forget(self) -> None:
        """Stand nowhere: what it held is of no more use."""
        self._pristine = False
        self.step, self._fingerprint = -1, None
        self.progress = self.ahead = None

    def fall_behind(self, version: int) -> float:
        """The others hold ``version``, and this worker will copy it: the norm of the residual that it has to drop."""
        self.progress = self.ahead = None
        if isinstance(self.session, Rounds):
            self.session.start_over()
        return self.session.memories.adopt(version)

    def commit(self, done: Round) -> None:
        """Take the round that the members agreed on. Nothing in it waits or fails for another's sake."""
        self._pristine = False
        self.session.apply(done.agreed, lambda: self.update(self.step), self._rate_change(self.step, done.version))
        self.ledger = self.ledger + done.roll.ledger
        self.lagging = done.lagging_after(self.step, self.lagging)
        self.step = done.version

    def update(self, step: int) -> None:
        """The optimizer's step from the gradients that are there, by the schedule of ``step``."""
        self._pristine = False
        schedule = self.job.schedule
        if schedule is not None:
            factor = schedule(step)
            for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = rate * factor
        if self.job.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.job.clip_norm)
        self.optimizer.step()

    def _rate_change(self, base: int, version: int) -> float:
        """The learning rate from ``base`` to ``version`` over that of as many steps before."""
        schedule, num_steps = self.job.schedule, version - base
        if schedule is None or base < num_steps:
            return 1.0
        before = sum(map(schedule, range(base - num_steps, base)))
        return sum(map(schedule, range(base, version))) / before if before > 0 else 1.0

    def committed(self) -> AbstractContextManager[None]:
        """Within this the model is that of the version, whatever has been computed since."""
        return self.session.committed()

    def fingerprint(self) -> str:
        """16 hex digits of everything in a version that all members hold alike; computed once a step."""
        if self._fingerprint is None or self._fingerprint[0] != self.step:
            text = f"{self.step}/{self.ledger.count}/{self.ledger.checksum}"
            text += "".join(f"/{lane}:{step}" for lane, step in sorted(self.lagging.items()))
            optimizer = None if self.is_local else self.optimizer
            if isinstance(self.session, Served):  # the shards hold it
                return xxhash.xxh3_64_hexdigest(text.encode())
            with self.committed():
                found = fingerprint(self.model, optimizer, text.encode(), self._common())
            self._fingerprint = (self.step, found)
        return self._fingerprint[1]

    def _common(self) -> dict[str, torch.Tensor]:
        return self.session.state() | self.session.memories.state()

    def standing(self) -> Standing:
        return NOTHING if self.step < 0 else Standing(self.step, self.fingerprint())

    def capture(self, num_active: int | None = None, **meta: Any) -> Snapshot:
        """A copy of everything that a version holds. ``num_active``: so many members hold a residual, each the same,
        which is then a part of the copy."""
        known: dict[str, Any] = {
            "fingerprint": self.fingerprint(),
            "ledger": [self.ledger.count, self.ledger.checksum],
            "seed": self.job.seed,
        }
        if self.lagging:
            known["lagging"] = {str(lane): step for lane, step in self.lagging.items()}
        strategy = self._common()
        if num_active is not None:
            known[_NUM_ACTIVE] = num_active
            strategy |= self.session.memories.residual()
        with self.committed():
            taken = capture(self.model, self.optimizer, self.step, {**known, **meta})
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in strategy.items()}
        return Snapshot(taken.step, taken.model, taken.optimizer, taken.meta, copies)

    def all_finite(self) -> bool:
        """Whether every parameter is a finite number."""
        with torch.no_grad():
            return all(bool(torch.isfinite(p).all()) for p in self._parameters)


def pack(snapshot: Snapshot) -> Parcel:
    """A snapshot as a parcel for a peer."""
    parts = {"model": snapshot.model, "optimizer": snapshot.optimizer, "strategy": snapshot.strategy}
    tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    return Parcel(tensors, {"step": snapshot.step, "meta": snapshot.meta})


def unpack(parcel: Parcel) -> Snapshot:
    """The other way round."""
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "strategy": {}}
    for name, tensor in parcel.tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    return Snapshot(step=parcel.meta["step"], meta=dict(parcel.meta["meta"]), **parts)


def seed_everything(seed: int) -> None:
    """Seed torch, NumPy's global generator and Python's: whatever a model or loss may draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def step_seed(seed: int, step: int, first_lane: int) -> int:
    """Random state is derived, not carried: a step's draws depend on the seed, the step and the lanes alone."""
    return int.from_bytes(np.random.SeedSequence([seed, step, first_lane]).generate_state(2).tobytes()[:7], "little")


def check_loss(loss: Any) -> None:
    """``ConfigError`` unless a task's loss is what a loss must be."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ConfigError(f"task.loss must return the mean loss as a scalar tensor, not {came}")
