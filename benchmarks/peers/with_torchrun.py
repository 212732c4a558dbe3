"""DistributedDataParallel under torchrun: when a worker dies, all restart and read the last checkpoint.

torchrun … -m benchmarks.peers.with_torchrun FOLDER WORKLOAD
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers import checkpoint
from benchmarks.peers.log import WorkerLog
from benchmarks.workload import Workload


def train(folder: Path, workload: Workload) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    log = WorkerLog(folder, rank)
    log.started()
    images, labels = workload.read_data(folder)
    order = workload.order()
    model = workload.model()
    optimizer = workload.optimizer(model)
    path = folder / "checkpoint.pt"
    done = checkpoint.load(path, model, optimizer)
    group = os.environ["TORCHELASTIC_RESTART_COUNT"]
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    for step in range(done, workload.num_steps):
        ids = workload.share(order, step, rank, world_size)
        log.offered(step + 1, group, ids.tolist())
        optimizer.zero_grad()
        workload.loss(replica, images[ids], labels[ids]).backward()
        optimizer.step()
        log.committed(step + 1, group)
        if rank == 0 and (step + 1) % workload.checkpoint_every_steps == 0:
            checkpoint.save(path, model, optimizer, step + 1)
    log.finished()
    dist.destroy_process_group()


if __name__ == "__main__":
    train(Path(sys.argv[1]), Workload(**json.loads(sys.argv[2])))
