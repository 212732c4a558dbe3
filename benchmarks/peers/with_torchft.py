"""torchft's Manager over gloo: one replica group of one worker; the survivors of a kill go on without it.

    python -m benchmarks.peers.with_torchft RANK WORLD_SIZE FOLDER WORKLOAD

TORCHFT_LIGHTHOUSE says where the lighthouse is. The gradients are flattened and reduced in one call: torchft 0.2.0's
own DistributedDataParallel crashed here on a kill in mid-reduce. Each worker takes its samples by the number of the
committed step, so a step that is not committed is done again: fewer samples are lost than with torchft's own sampler.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo

from benchmarks.peers import checkpoint
from benchmarks.peers.log import WorkerLog
from benchmarks.workload import Workload

TIMEOUT = timedelta(seconds=10)
GROUP_TIMEOUT = timedelta(seconds=1)
HEARTBEAT_INTERVAL = timedelta(milliseconds=50)


def train(rank: int, world_size: int, folder: Path, workload: Workload) -> None:
    torch.set_num_threads(1)
    images, labels = workload.read_data(folder)
    order = workload.order()
    model = workload.model()
    optimizer = workload.optimizer(model)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = _manager(model, optimizer, rank, store)
    gradients = _flat_gradients(model)
    log = WorkerLog(folder, rank)
    log.started()
    _wait_for_all(folder, world_size)
    while (step := manager.current_step()) < workload.num_steps:
        ids = workload.share(order, step, rank, world_size)
        manager.start_quorum()
        gradients.zero_()
        workload.loss(model, images[ids], labels[ids]).backward()
        manager.wait_quorum()
        group = str(manager._quorum_id)
        log.offered(manager.current_step() + 1, group, ids.tolist() if manager.is_participating() else [])
        manager.allreduce(gradients).wait()
        if not manager.should_commit():
            continue
        optimizer.step()
        done = manager.current_step()
        log.committed(done, group)
        if manager.participating_rank() == 0 and done % workload.checkpoint_every_steps == 0:
            checkpoint.save(folder / "checkpoint.pt", model, optimizer, done)
    log.finished()
    manager.shutdown(wait=False)


def _wait_for_all(folder: Path, world_size: int) -> None:
    """Begin together: the first quorum waits for all whose manager beats, and every manager beats once it is logged."""
    while len(list(folder.glob("worker-*.jsonl"))) < world_size:
        time.sleep(0.01)


def _manager(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, store: TCPStore) -> Manager:
    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    return Manager(
        pg=ProcessGroupGloo(timeout=GROUP_TIMEOUT),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1,
        timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        hostname="127.0.0.1",
        replica_id=f"worker_{rank}",
        heartbeat_interval=HEARTBEAT_INTERVAL,
        init_sync=False,
    )


def _flat_gradients(model: nn.Module) -> Tensor:
    """One tensor that every parameter's gradient is a view of."""
    parameters = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


if __name__ == "__main__":
    train(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Workload(**json.loads(sys.argv[4])))
