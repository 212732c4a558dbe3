"""Each peer as a value: what it is, how it is started, and what was set so that it recovers as fast as it can."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import REPOSITORY
from benchmarks.peers.processes import Command
from benchmarks.workload import Workload

NUM_WORKERS = 3
HEARTBEAT_TIMEOUT_MS = 400
LIGHTHOUSE = {"quorum_tick_ms": 20, "join_timeout_ms": 10_000, "min_replicas": 2}
RAY_INTERVALS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# Else restarted workers find the addresses of the dead in torchrun's own store, and gloo is refused or waits for ever.
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
PLAIN = {
    "PYTHONPATH": str(REPOSITORY),
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """``commands(python, folder, workload)`` start one epoch of training; ``package`` is what its version is of."""

    name: str
    package: str
    commands: Callable[[Path, Path, Workload], list[Command]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def _arguments(workload: Workload) -> str:
    return json.dumps(asdict(workload))


def _torchrun(python: Path, folder: Path, workload: Workload) -> list[Command]:
    options = [
        "--nnodes=1",
        f"--nproc-per-node={NUM_WORKERS}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--max-restarts=3",
        "--monitor-interval=0.02",
    ]
    script = ["-m", "benchmarks.peers.with_torchrun", str(folder), _arguments(workload)]
    environment = {**PLAIN, **FRESH_STORE}
    return [Command(arguments=[str(python), "-m", "torch.distributed.run", *options, *script], environment=environment)]


def _ray_train(python: Path, folder: Path, workload: Workload) -> list[Command]:
    script = ["-m", "benchmarks.peers.with_ray_train", str(NUM_WORKERS), str(folder), _arguments(workload)]
    environment = {**PLAIN, "RAY_AUTH_MODE": "disabled", **RAY_INTERVALS}
    return [Command(arguments=[str(python), *script], environment=environment)]


def torchft_commands(
    python: Path, folder: Path, workload: Workload, *, heartbeat_timeout_ms: int = HEARTBEAT_TIMEOUT_MS
) -> list[Command]:
    """A lighthouse, and workers that are a replica group each; the time-out is as short as ``safe_timeout`` allows."""
    address = f"127.0.0.1:{_free_port()}"
    settings = {**LIGHTHOUSE, "heartbeat_timeout_ms": heartbeat_timeout_ms}
    options = [f"--{name}={value}" for name, value in settings.items()]
    lighthouse = Command(arguments=[str(python.parent / "torchft_lighthouse"), f"--bind={address}", *options])
    environment = {**PLAIN, "RUST_LOG": "warn", "TORCHFT_LIGHTHOUSE": f"http://{address}"}
    script = [str(python), "-m", "benchmarks.peers.with_torchft"]
    workers = [
        Command(
            arguments=[*script, str(rank), str(NUM_WORKERS), str(folder), _arguments(workload)],
            environment=environment,
            revived=True,
        )
        for rank in range(NUM_WORKERS)
    ]
    return [lighthouse, *workers]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="torchrun",
            package="torch",
            commands=_torchrun,
            settings={"rdzv_backend": "c10d", "monitor_interval_s": 0.02, "max_restarts": 3, **FRESH_STORE},
            note="all workers restart from the last checkpoint",
        ),
        Peer(
            name="ray_train",
            package="ray",
            commands=_ray_train,
            settings={"max_failures": 3, **RAY_INTERVALS},
            note="the group of workers is made anew and reads the last reported checkpoint",
        ),
        Peer(
            name="torchft",
            package="torchft",
            commands=torchft_commands,
            settings={
                **LIGHTHOUSE,
                "heartbeat_timeout_ms": HEARTBEAT_TIMEOUT_MS,
                "heartbeat_interval_ms": 50,
                "group_timeout_s": 1,
            },
            note="survivors go on without the dead worker, whose samples are lost until its replacement is in; after "
            "about every fourth kill one of them first hung in its reduction for the group's time-out",
        ),
    )
}
