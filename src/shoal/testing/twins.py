"""Slow obvious twins of what shoal does fast."""

from __future__ import annotations

import torch
from torch import nn

from shoal.job import GroupsParameters, Job
from shoal.lanes import Order
from shoal.sources.prefetch import split
from shoal.training.computing import loss_of
from shoal.training.kit import plan_steps
from shoal.training.replica import seed_everything, step_seed


def plain_loop(job: Job) -> tuple[nn.Module, list[float]]:
    """The plain PyTorch loop over the job's samples in the job's order: the model, and each step's loss."""
    seed_everything(job.seed)
    model = job.task.model()
    groups = job.task.parameter_groups(model) if isinstance(job.task, GroupsParameters) else model.parameters()
    optimizer = job.optimizer(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps, reader, losses = plan_steps(job), job.train.open(), []
    for step in range(steps.total_steps):
        span = steps.span(step)
        order = Order(job.train.block_sizes(), job.num_lanes, job.seed, span.epoch)
        parts = [p for i in range(job.num_lanes) for p in order.slice(i, int(span.starts[i]), int(span.stops[i]))]
        seed_everything(step_seed(job.seed, step, 0))
        optimizer.zero_grad()
        loss_sum = 0.0
        for rows in split(parts, job.micro_batch or span.num_samples):
            weight = sum(len(part.rows) for part in rows) / span.num_samples
            loss = loss_of(job, model, reader.gather(rows))
            (loss * weight).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.item() * weight
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (job.schedule(step) if job.schedule else 1.0)
        if job.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
        optimizer.step()
        losses.append(loss_sum)
    reader.close()
    return model, losses
