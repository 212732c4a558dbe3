"""One worker of torch's DistributedDataParallel on the task of ``benchmarks.sparse_job``.

With a dense gradient of the table, or a sparse one; with a world size of 1 it is the plain loop. Rank 0 writes seconds
a step and the AUC to ``FOLDER/result.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import sparse_job
from benchmarks.loops import interface
from shoal.evaluation import measure, merged
from shoal.lanes import Order, Steps
from shoal.shards.embedding import OwnTables
from shoal.sources import Prefetch

TIMEOUT_S = 120.0
NUM_LANES = sparse_job.job.num_lanes


def build(*, sparse: bool) -> nn.Module:
    """The job's net with torch's embedding, from the same parameters."""
    torch.manual_seed(sparse_job.job.seed)
    ours = sparse_job.Net()
    rows = nn.Embedding(sparse_job.NUM_IDS, sparse_job.DIM, sparse=sparse)
    spec = ours.rows.spec  # type: ignore[union-attr]
    with torch.no_grad():
        rows.weight.copy_(torch.from_numpy(OwnTables([spec]).pull(spec.name, np.arange(sparse_job.NUM_IDS))))
    net = sparse_job.Net(rows)
    net.dense.load_state_dict(ours.dense.state_dict())
    return net


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_ddp", description=__doc__)
    for name, kind in (("rank", int), ("world_size", int), ("folder", Path), ("steps", int)):
        parser.add_argument(name, type=kind)
    parser.add_argument("--sparse", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    net = build(sparse=chosen.sparse)
    model: nn.Module = net
    if chosen.world_size > 1:
        with suppress(StopIteration):
            os.environ["GLOO_SOCKET_IFNAME"] = interface()
        dist.init_process_group(
            "gloo", init_method=f"file://{chosen.folder}/store", rank=chosen.rank, world_size=chosen.world_size,
            timeout=timedelta(seconds=TIMEOUT_S),
        )  # fmt: skip
        model = DistributedDataParallel(net, gradient_as_bucket_view=not chosen.sparse)
    optimizer = sparse_job.optimizer_of(net.parameters())
    job = sparse_job.job
    sizes = job.train.block_sizes()
    order = lru_cache(maxsize=2)(lambda epoch: Order(sizes, NUM_LANES, job.seed, epoch))
    steps = Steps(sum(sizes), job.global_batch, NUM_LANES, epochs=None, total_steps=chosen.steps)
    lanes = tuple(range(chosen.rank, NUM_LANES, chosen.world_size))
    times, last_s = [], time.perf_counter()
    for local in Prefetch(job.train.open(), order, steps, lanes, first_step=0):
        optimizer.zero_grad()
        loss = sparse_job.Clicks().loss(model, local.batches[0])
        weight = local.num_samples * chosen.world_size / steps.span(local.step).num_samples
        (loss * weight).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        now_s = time.perf_counter()
        times.append(now_s - last_s)
        last_s = now_s
    if chosen.rank == 0:
        assert job.test is not None
        figures = merged([measure(job, net, job.test.open(), range(NUM_LANES))])
        result = {"times": times, "auc": figures["auc"]}
        (chosen.folder / "result.json").write_text(json.dumps(result))
    os._exit(0)  # its connections end with it


if __name__ == "__main__":
    main()
