"""Servers of one model over HTTP, ours and the peers', as values; and one that runs.

All have the same weights from the same file, one thread for each copy of the model, and may use every core. What sends
the requests is on the last core, which the servers share: with two cores, a server may need both.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Target
from benchmarks.machine import REPOSITORY
from benchmarks.peers.envs import ENVS, pins, python_of
from benchmarks.peers.processes import Command, Tree
from benchmarks.served_models import KINDS
from benchmarks.served_weights import JOB, Files

Settings = Mapping[str, Any]
START_S = 120.0
DEADLINE_S = 0.25
"""By which an answer is in time where more is offered than can be done."""
GUARDED_AT_ONCE = 8
"""Samples that a peer computes together then: a batch of 64 would be late by itself."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RAY_AUTH_MODE": "disabled"}


@dataclass(frozen=True, kw_only=True)
class Server:
    """``variants`` are tried, and the best is kept. ``guarded``: what is set besides where more is offered than it can
    do, so that it refuses what it cannot answer in ``DEADLINE_S``, if it can be told to. ``protocol``: what a request
    is, ``oip`` for the Open Inference Protocol, ``json`` by name, or ``rows``."""

    name: str
    package: str
    protocol: str
    variants: Mapping[str, Settings]
    guarded: Settings = field(default_factory=dict)
    single: str = ""
    """The variant with one copy of the model."""

    @property
    def version(self) -> str:
        return pins(self.name)[self.package]

    def is_installed(self) -> bool:
        return (ENVS / self.name / "installed.txt").exists()

    def path(self, model: str) -> str:
        return f"/v2/models/{model}/infer" if self.protocol == "oip" else "/predict"

    def command(self, model: str, files: Files, port: int, settings: Settings) -> list[str]:
        script = f"benchmarks.peers.with_{self.name}"
        words = [model, str(files.weights), str(port), json.dumps(settings)]
        return [str(python_of(self.name)), "-m", script, *words]


@dataclass(frozen=True, kw_only=True)
class Ours(Server):
    """``shoal serve``: the one place that knows its command line."""

    @property
    def version(self) -> str:
        return "this one"

    def is_installed(self) -> bool:
        return True

    def command(self, model: str, files: Files, port: int, settings: Settings) -> list[str]:
        words = ["serve", str(files.package), "--job", str(JOB), "--port", str(port)]
        for name, value in settings.items():
            words += [f"--{name}", str(value)]
        return [sys.executable, "-c", "from shoal.cli import main; main()", *words]


def ours() -> Ours:
    """Us."""
    return Ours(
        name="shoal",
        package="shoal",
        protocol="oip",
        variants={
            "one": {"replicas": 1},
            "two": {"replicas": 2},
        },
        single="one",
        guarded={"max-wait": DEADLINE_S / 2},
    )


PEERS: Mapping[str, Server] = {
    server.name: server
    for server in (
        Server(
            name="mlserver", package="mlserver", protocol="oip", single="apart, batches",
            variants={
                "in process": {"workers": 0, "batch_wait_s": 0},
                "in process, batches": {"workers": 0, "batch_wait_s": 0.001},
                "apart, batches": {"workers": 1, "batch_wait_s": 0.001},
                "two, batches": {"workers": 2, "batch_wait_s": 0.001},
            },
        ),
        Server(
            name="fastapi", package="fastapi", protocol="json", single="one",
            variants={"one": {"workers": 1, "most_waiting": 4096}, "two": {"workers": 2, "most_waiting": 4096}},
            guarded={"most_waiting": 40},
        ),
        Server(
            name="flask", package="Flask", protocol="json", single="one",
            variants={
                "one": {"workers": 1, "threads": 8, "backlog": 2048},
                "two": {"workers": 2, "threads": 4, "backlog": 2048},
            },
        ),
        Server(
            name="litserve", package="litserve", protocol="json", single="one, batches",
            variants={
                "one": {"workers": 1, "batch_wait_s": 0, "fast_queue": False, "timeout_s": 30},
                "one, batches": {"workers": 1, "batch_wait_s": 0.001, "fast_queue": True, "timeout_s": 30},
                "two, batches": {"workers": 2, "batch_wait_s": 0.001, "fast_queue": True, "timeout_s": 30},
            },
            guarded={"timeout_s": 0.25},
        ),
        Server(
            name="bentoml", package="bentoml", protocol="rows", single="one, batches",
            variants={
                "one": {"workers": 1, "batchable": False},
                "one, batches": {"workers": 1, "batchable": True, "max_latency_ms": 50},
                "two, batches": {"workers": 2, "batchable": True, "max_latency_ms": 50},
            },
            guarded={"max_concurrency": 40, "max_latency_ms": 250},
        ),
        Server(
            name="ray_serve", package="ray", protocol="json", single="one",
            variants={
                "one": {"workers": 1, "batch_wait_s": 0.001, "max_ongoing": 256, "most_waiting": -1},
                "two": {"workers": 2, "batch_wait_s": 0.001, "max_ongoing": 256, "most_waiting": -1},
            },
            guarded={"max_ongoing": 32, "most_waiting": 8},
        ),
    )
}  # fmt: skip


def body(server: Server, model: str, deadline_s: float | None = None) -> bytes:
    """A request for one sample; by the Open Inference Protocol with its ``timeout``, if there is a deadline."""
    kind = KINDS[model]
    sample = kind.sample()
    if server.protocol == "json":
        return json.dumps(sample, separators=(",", ":")).encode()
    flat = {name: value if isinstance(value, list) else [value] for name, value in sample.items()}
    if server.protocol == "rows":
        return json.dumps({"rows": [[each for values in flat.values() for each in values]]}).encode()
    inputs = [
        {"name": name, "datatype": datatype, "shape": [1, *shape], "data": flat[name]}
        for name, (datatype, shape) in kind.inputs.items()
    ]
    parameters = {"parameters": {"timeout": round(1e6 * deadline_s)}} if deadline_s else {}
    return json.dumps({"inputs": inputs, **parameters}, separators=(",", ":")).encode()


def numbers(server: Server, answer: Any) -> list[float]:
    """What a response says, one number after another."""
    if server.protocol == "oip":
        by_name = {output["name"]: output["data"] for output in answer["outputs"]}
        answer = [by_name[name] for name in sorted(by_name)]
    elif server.protocol == "json":
        answer = [answer[name] for name in sorted(answer)]
    return [float(each) for each in np.concatenate([np.ravel(part) for part in answer])]


class Running:
    """A server that accepts requests for one sample."""

    def __init__(self, tree: Tree, target: Target) -> None:
        self.target = target
        self._tree = tree

    def rss_bytes(self) -> int:
        """What all its processes have in memory; what they share counts for each."""
        return sum(_rss_bytes(pid) for pid in self._tree.pids())


@contextmanager
def running(server: Server, variant: str, model: str, files: Files, *, guarded: bool = False) -> Iterator[Running]:
    """Start it, wait until it answers as the model does, and end it."""
    settings = {**server.variants[variant], **(server.guarded if guarded else {})}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    places = [str(REPOSITORY), str(REPOSITORY / "src")] if isinstance(server, Ours) else [str(REPOSITORY)]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(places), "SERVED": model}
    if guarded:
        environment["SERVED_MOST_AT_ONCE"] = str(GUARDED_AT_ONCE)
    command = Command(arguments=server.command(model, files, port, settings), environment=environment)
    said, asked = files.folder / f"{server.name}.log", files.folder / f"{server.name}-{model}.json"
    asked.write_bytes(body(server, model, DEADLINE_S if guarded else None))
    target = Target(url=f"http://127.0.0.1:{port}{server.path(model)}", body=asked, core=generator_core())
    with Tree([command], said) as tree:
        found = _first_answer(tree, target, said)
        expected = files.expected
        if not np.allclose(numbers(server, found), expected, atol=1e-3):
            raise SystemExit(f"{server.name} answers {found}, and the model says {expected}")
        yield Running(tree, target)


def generator_core() -> int:
    """The last that there is."""
    return max(os.sched_getaffinity(0))


def _first_answer(tree: Tree, target: Target, said: Path) -> Any:
    request = urllib.request.Request(
        target.url, target.body.read_bytes(), {"content-type": target.content_type}, method="POST"
    )
    deadline_s, why = time.monotonic() + START_S, "nothing"
    while time.monotonic() < deadline_s and not tree.failed():
        try:
            with urllib.request.urlopen(request, timeout=START_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            why = f"{error.code}: {error.read(1000)!r}"
        except OSError as error:
            why = str(error)
        time.sleep(0.1)
    raise SystemExit(f"a server did not come up: {why}\n{said.read_text()[-3000:]}")


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
