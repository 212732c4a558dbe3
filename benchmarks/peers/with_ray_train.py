"""Ray Train's TorchTrainer with a failure policy: when a worker dies, the group is made anew from the last report.

    python -m benchmarks.peers.with_ray_train WORLD_SIZE FOLDER WORKLOAD

This is the driver; it starts a Ray cluster of its own on this machine and ends it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers import checkpoint
from benchmarks.peers.log import WorkerLog
from benchmarks.workload import Workload


def train(config: dict[str, Any]) -> None:
    """One worker: the plain loop, and a report every so many steps."""
    torch.set_num_threads(1)
    folder, workload = Path(config["folder"]), Workload(**config["workload"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    log = WorkerLog(folder, rank)
    log.started()
    images, labels = workload.read_data(folder)
    order = workload.order()
    model = workload.model()
    optimizer = workload.optimizer(model)
    done = _resume(model, optimizer)
    group = str(ray.get_runtime_context().get_placement_group_id())
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    for step in range(done, workload.num_steps):
        ids = workload.share(order, step, rank, world_size)
        log.offered(step + 1, group, ids.tolist())
        optimizer.zero_grad()
        workload.loss(replica, images[ids], labels[ids]).backward()
        optimizer.step()
        log.committed(step + 1, group)
        if (step + 1) % workload.checkpoint_every_steps == 0:
            _report(rank, model, optimizer, step + 1)
    log.finished()


def _resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    saved = ray.train.get_checkpoint()
    if saved is None:
        return 0
    with saved.as_directory() as folder:
        return checkpoint.load(Path(folder) / "checkpoint.pt", model, optimizer)


def _report(rank: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Every rank must report; the first hands over the checkpoint."""
    if rank != 0:
        ray.train.report({"step": step})
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "checkpoint.pt", model, optimizer, step)
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))


def main(world_size: int, folder: Path, workload: dict[str, Any]) -> None:
    ray.init(
        num_cpus=world_size + 1,
        include_dashboard=False,
        object_store_memory=128 << 20,
        _temp_dir=str(folder / "ray"),
    )
    trainer = TorchTrainer(
        train,
        train_loop_config={"folder": str(folder), "workload": workload},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=world_size, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            storage_path=str(folder / "results"),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=3),
        ),
    )
    trainer.fit()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
