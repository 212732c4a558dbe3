"""One worker's copy of what is trained: model, optimizer, the account of samples, and the step that they stand at."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.comm.transfer import Parcel
from shoal.errors import ConfigError
from shoal.job import GroupsParameters, Job
from shoal.lanes import Ledger
from shoal.membership import NOTHING, Standing
from shoal.strategies import Agreed
from shoal.versions import Snapshot, capture, fingerprint, restore


class Replica:
    """Built blank (step -1). ``plant``, or ``restore`` a snapshot; then only ``commit`` moves it, a step at a time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.step = -1
        self.ledger = Ledger()
        self._build()

    def _build(self) -> None:
        job = self.job
        seed_everything(job.seed)
        self.model = job.task.model().to(job.device)
        self.optimizer = job.optimizer(self._optimized())
        self.reducer = job.strategy.bind(self.model)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._fingerprint: tuple[int, str] | None = None
        self._pristine = True

    def _optimized(self) -> Any:
        if isinstance(self.job.task, GroupsParameters):
            return self.job.task.parameter_groups(self.model)
        return self.model.parameters()

    def plant(self) -> None:
        """Stand at step 0: what the job's seed gives."""
        if not self._pristine:
            self._build()
        self.step, self.ledger = 0, Ledger()
        self.reducer.reset()

    def restore(self, snapshot: Snapshot) -> None:
        """Stand where the snapshot stands."""
        self._pristine = False
        self.step = -1
        restore(snapshot, self.model, self.optimizer)
        self.ledger = Ledger(*snapshot.meta["ledger"])
        self.reducer.reset()
        self._fingerprint = None
        self.step = snapshot.step

    def commit(self, agreed: Agreed, ledger: Ledger) -> None:
        """Take the step that the members agreed on. Nothing in it waits or fails for another's sake."""
        self._pristine = False
        self.reducer.apply(agreed, self._update)
        self.ledger = self.ledger + ledger
        self.step += 1

    def _update(self) -> None:
        schedule = self.job.schedule
        if schedule is not None:
            factor = schedule(self.step)
            for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = rate * factor
        if self.job.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.job.clip_norm)
        self.optimizer.step()

    def fingerprint(self) -> str:
        """16 hex digits of everything that a version holds; computed once a step."""
        if self._fingerprint is None or self._fingerprint[0] != self.step:
            ledger = f"{self.step}/{self.ledger.count}/{self.ledger.checksum}"
            self._fingerprint = (self.step, fingerprint(self.model, self.optimizer, ledger.encode()))
        return self._fingerprint[1]

    def standing(self) -> Standing:
        return NOTHING if self.step < 0 else Standing(self.step, self.fingerprint())

    def capture(self, **meta: Any) -> Snapshot:
        """A copy of everything that a version holds."""
        ledger = [self.ledger.count, self.ledger.checksum]
        known = {"fingerprint": self.fingerprint(), "ledger": ledger, "seed": self.job.seed}
        return capture(self.model, self.optimizer, self.step, {**known, **meta})

    def all_finite(self) -> bool:
        """Whether every parameter is a finite number."""
        with torch.no_grad():
            return all(bool(torch.isfinite(p).all()) for p in self._parameters)


def pack(snapshot: Snapshot) -> Parcel:
    """A snapshot as a parcel for a peer."""
    tensors = {f"model/{name}": tensor for name, tensor in snapshot.model.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in snapshot.optimizer.items()}
    return Parcel(tensors, {"step": snapshot.step, "meta": snapshot.meta})


def unpack(parcel: Parcel) -> Snapshot:
    """The other way round."""
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
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
