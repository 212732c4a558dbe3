"""torchft's DiLoCo over gloo, for time to accuracy: one replica group of one worker on each host of a lab.

    python -m benchmarks.peers.with_torchft_diloco RANK WORLD_SIZE ADDRESS FOLDER OPTIONS

TORCHFT_LIGHTHOUSE says where the lighthouse is. The folder holds the data as ``NAME-images.npy`` and
``NAME-labels.npy``; ``OPTIONS`` is JSON. Rank 0 writes ``events.jsonl`` there, in the form of a run's events. Samples
are dealt from one permutation an epoch; the model, its seed, the batch and the schedule are those of Shoal's runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.nn.functional import cross_entropy
from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo

TIMEOUT = timedelta(seconds=30)
WIDTH = 1024


def train(rank: int, world_size: int, address: str, folder: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(options["seed"])
    model = nn.Sequential(
        nn.Linear(784, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )  # fmt: skip
    images, labels = read(folder, "train")
    test_images, test_labels = read(folder, "test")
    inner = torch.optim.SGD(model.parameters(), lr=options["learning_rate"], fused=True)
    outer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=options["outer_momentum"], nesterov=True)
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    manager = make_manager(model, inner, outer, address, rank, store)
    (folder / f"ready-{rank}").touch()
    while len(list(folder.glob("ready-*"))) < world_size:
        time.sleep(0.01)
    note(folder, rank, "generation")
    losses: list[float] = []
    with DiLoCo(manager, [model], inner, outer, sync_every=options["sync_every"]):
        for step in range(options["steps"]):
            ids = share(step, rank, world_size, options, len(images))
            inner.param_groups[0]["lr"] = options["learning_rate"] * factor(step, options)
            inner.zero_grad()
            loss = cross_entropy(model(scale(images[ids])), labels[ids])
            loss.backward()
            inner.step()
            losses.append(float(loss.detach()))
            if (step + 1) % options["evaluate_every"] == 0:
                note(
                    folder,
                    rank,
                    "progress",
                    step=step + 1,
                    loss=sum(losses) / len(losses),
                    rounds=manager.current_step(),
                )
                losses.clear()
                accuracy = measure(model, test_images, test_labels) if rank == 0 else 0.0
                note(folder, rank, "evaluated", step=step + 1, figures={"accuracy": accuracy})
    note(folder, rank, "ended", rounds=manager.current_step())
    manager.shutdown(wait=False)


def read(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images (n, 784) uint8 and labels (n,)."""
    return tuple(torch.from_numpy(np.load(folder / f"{name}-{part}.npy")) for part in ("images", "labels"))


def scale(images: Tensor) -> Tensor:
    """As in ``benchmarks.accuracy_job``."""
    return (images.float() / 255 - 0.286) / 0.353


def factor(step: int, options: dict[str, Any]) -> float:
    """As in ``benchmarks.accuracy_job``."""
    return min(1.0, (step + 1) / options["warm_up"]) * (1 - step / options["steps"])


def share(step: int, rank: int, world_size: int, options: dict[str, Any], num_samples: int) -> Tensor:
    """The rank's samples of a step."""
    batch = options["global_batch"]
    epoch, place = divmod(step, num_samples // batch)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(epoch))
    return order[place * batch + rank : (place + 1) * batch : world_size]


def measure(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy on the test data, at a step where all hold the same parameters."""
    with torch.no_grad():
        return float((model(scale(images)).argmax(1) == labels).float().mean())


def note(folder: Path, rank: int, kind: str, **fields: Any) -> None:
    """An event of rank 0's."""
    if rank == 0:
        with (folder / "events.jsonl").open("a") as log:
            log.write(json.dumps({"at_s": time.time(), "kind": kind, **fields}) + "\n")


def make_manager(
    model: nn.Module, inner: Any, outer: Any, address: str, rank: int, store: TCPStore
) -> Manager:  # fmt: skip
    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["inner"])
        outer.load_state_dict(state["outer"])

    return Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict(), "outer": outer.state_dict()},
        min_replica_size=4,
        use_async_quorum=False,
        timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        hostname=address,
        replica_id=f"worker_{rank}",
        init_sync=False,
    )


if __name__ == "__main__":
    train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), json.loads(sys.argv[5]))
    os._exit(0)
