"""What each member has for itself is spread evenly, so that one version holds it and any number of workers go on."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from shoal.comm.collectives import Group
from shoal.training.replica import Replica


def level(replica: Replica, group: Group, *, active: bool) -> int:
    """Spread residuals, and average the optimizers' states where each worker has its own, over the ``active`` members.

    Returns how many those are. A collective call. Wire: an all-reduce of each in float32.
    """
    num_active = replica.session.memories.level(group, active=active)
    if replica.is_local:
        _average(replica, group, active=active)
    return num_active


def _average(replica: Replica, group: Group, *, active: bool) -> None:
    """Each slot's mean over the members that have it, such as ``momentum_buffer``, for all parameters at once."""
    parameters = [p for g in replica.optimizer.param_groups for p in g["params"]]
    states = [replica.optimizer.state.get(p, {}) for p in parameters]
    own = {n for state in states for n, value in state.items() if isinstance(value, Tensor)} if active else set()
    for slot in sorted(
        {name for names in group.all_gather(json.dumps(sorted(own)).encode()) for name in json.loads(names)}
    ):
        values = [state.get(slot) if active else None for state in states]
        scalar = _is_scalar(group, values)
        like = [torch.zeros(()) if scalar else torch.zeros(p.shape, device=p.device) for p in parameters]
        flat = torch.cat([(z if v is None else v.to(z)).reshape(-1) for v, z in zip(values, like, strict=True)])
        has = torch.tensor([float(v is not None) for v in values])
        flat, has = flat.to(group.seat.device), has.to(group.seat.device)
        for work in (group.all_reduce(flat), group.all_reduce(has)):
            work.wait()
        if active:
            _write(replica, slot, flat, has)


def _is_scalar(group: Group, values: list[Tensor | None]) -> bool:
    """Whether any member's values of a slot are single numbers, such as Adam's step counts."""
    found = torch.tensor([float(any(v is not None and v.dim() == 0 for v in values))], device=group.seat.device)
    group.all_reduce(found).wait()
    return bool(found.item())


def _write(replica: Replica, slot: str, flat: Tensor, has: Tensor) -> None:
    parameters = [p for g in replica.optimizer.param_groups for p in g["params"]]
    scalar = len(flat) == len(parameters)
    sizes = [1 if scalar else p.numel() for p in parameters]
    for parameter, mean, count in zip(parameters, torch.split(flat, sizes), has.tolist(), strict=True):
        if not count:
            continue
        state = replica.optimizer.state[parameter]
        mean = mean / count
        if scalar:
            state[slot] = mean.reshape(()).round().to(state.get(slot, mean))
        elif slot in state:
            state[slot].copy_(mean.view(parameter.shape))
        else:
            state[slot] = mean.view(parameter.shape).to(parameter)
