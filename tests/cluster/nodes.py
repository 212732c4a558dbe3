"""Hosts of a lab, bare or as Ray nodes: real addresses, real deaths, real cuts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shoal.lab import Host, Lab, LabSpec, why_not

__all__ = ["Cluster", "Node", "cluster", "why_not"]

PORT = 6379
MOST_NODES = 4
START_S = 120.0


@dataclass(frozen=True)
class Node:
    """A host with an address of its own. ``run`` and ``spawn`` start processes on it; ``kill`` ends all that it has."""

    host: Host
    lab: Lab
    env: dict[str, str]

    @property
    def address(self) -> str:
        return self.host.address

    def spawn(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self.host.prefix, *command],
                env={**self.env, **env}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def run(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        full = [*self.host.prefix, *command]
        return subprocess.run(full, env={**self.env, **env}, capture_output=True, text=True, timeout=180, check=False)

    def pids(self) -> list[int]:
        return self.host.pids()

    def kill(self) -> None:
        self.lab.kill(self.host)


@dataclass
class Cluster:
    """``nodes``, the first of them the head; ``folder`` holds what they write."""

    folder: Path
    lab: Lab
    env: dict[str, str]
    nodes: list[Node] = field(default_factory=list)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{PORT}"

    def add_host(self) -> Node:
        """One more host, with nothing running."""
        node = Node(self.lab.hosts[len(self.nodes)], self.lab, self.env)
        self.nodes.append(node)
        return node

    def part(self, *nodes: Node) -> None:
        """No packet passes between these nodes any more; each still reaches all others."""
        self.lab.part(*(node.host for node in nodes))

    def add(self, num_cpus: int, hidden: Path | None = None) -> Node:
        """Start a node, the first as head, and wait until Ray counts it. It sees nothing in the folder ``hidden``."""
        node = self.add_host()
        number = len(self.nodes)
        where = ["--head", f"--port={PORT}"] if number == 1 else [f"--address={self.address}"]
        if number == 1:
            where += ["--include-dashboard=false", f"--temp-dir={self.folder}"]
        options = [f"--node-ip-address={node.address}", f"--num-cpus={num_cpus}", "--object-store-memory=100000000"]
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", "--block", "--disable-usage-stats", *where, *options]
        if hidden is not None:  # `ip netns exec` gives each process tree a view of its own of what is mounted
            command = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden), *command]
        self.children.append(node.spawn(command, self.folder / f"node{number}.log", {}))
        self._wait_for(node)
        return node

    def _wait_for(self, node: Node) -> None:
        alive = "[n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']]"
        ask = f"import ray; ray.init(log_to_driver=False); assert {node.address!r} in {alive}"
        deadline_s = time.monotonic() + START_S
        answer = None
        while time.monotonic() < deadline_s:
            answer = self.head.run([sys.executable, "-c", ask], env={"RAY_ADDRESS": self.address})
            if answer.returncode == 0:
                return
        said = answer and answer.stderr[-2000:]
        raise TimeoutError(f"Ray had no node at {node.address} within {START_S:g} s: {said}")

    def close(self) -> None:
        self.lab.down()
        for child in self.children:
            child.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def cluster(env: Mapping[str, str]) -> Iterator[Cluster]:
    """A Ray cluster without a node so far. Its processes have ``env`` too. Nothing of it is left afterwards."""
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with Lab(LabSpec(hosts=MOST_NODES)) as lab:
        folder = Path(tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp"))  # short, for Ray's sockets
        made = Cluster(folder, lab, {**inherited, **ours, "TMPDIR": str(folder), **env})
        try:
            yield made
        finally:
            made.close()
