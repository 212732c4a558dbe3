"""Processes in torch's default process group over gloo, as torchrun makes them, with what they train."""

from __future__ import annotations

import os
from contextlib import ExitStack
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shoal.comm.ddp import ddp_hook, exchange_bucket
from shoal.errors import ShoalError
from tests.comm.crew import LONG_S, Crew, forks

SLOW = ["torch._dynamo", "shoal.codecs.kernels"]  # what DistributedDataParallel and the codecs load when first used
forks.set_forkserver_preload(["shoal.comm.link", "shoal.comm.transfer", __name__, *SLOW])

WIDTH = 40


def _run(store, timeout_s, rank, world_size, act, host, line, entries):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    seconds = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=seconds)
    try:
        line.send(("returned", act(line)))
    except ShoalError as error:
        line.send(("raised", error))
    line.poll(None)  # tensors that were sent are fetched from this process


def crew(world_size, act, folder, timeout_s=LONG_S):
    """``act(line)`` in each process."""
    return Crew(world_size, act, launch=partial(_run, folder / "store", timeout_s))


def results(world_size, act, folder):
    """What ``act(line)`` returns, by rank."""
    with ExitStack() as stack:
        group = stack.enter_context(crew(world_size, act, folder))
        return [group.says(rank, "returned") for rank in range(world_size)]


class Crossed(nn.Module):
    """Layers that run in another order than they are named in, so that DistributedDataParallel cuts buckets anew."""

    def __init__(self):
        super().__init__()
        self.third = nn.Linear(WIDTH, 3)
        self.first = nn.Linear(6, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


def wrapped(model, codec, hooked=True, **options):
    """With small buckets and the hook: the model, the hook's state and the buckets that it has seen, as shapes."""
    model = DistributedDataParallel(model, bucket_cap_mb=0.004, **options)
    seen = []
    if not hooked:
        return model, None, seen
    state, _ = ddp_hook(model, codec)

    def noting(state, bucket):
        seen.append(tuple(tuple(p.shape) for p in bucket.parameters()))
        return exchange_bucket(state, bucket)

    model.register_comm_hook(state, noting)
    return model, state, seen


def batch(step, rank):
    """Inputs (16, 6), and what a fixed rule makes of them (16, 3)."""
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(1000 * step + rank))
    return inputs, torch.stack([inputs[:, 0] - inputs[:, 1], inputs[:, 2].sin(), inputs[:, 3:].sum(1)], dim=1)


def trained(codec, num_steps, hooked=True, **options):
    """The parameters after some steps, flat, and each step's loss over all ranks."""
    torch.manual_seed(0)
    model, _, _ = wrapped(Crossed(), codec, hooked, **options)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5), []
    for step in range(num_steps):
        inputs, targets = batch(step, dist.get_rank())
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    means = torch.stack(losses)
    dist.all_reduce(means)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), means / dist.get_world_size()
