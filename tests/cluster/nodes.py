"""Hosts in network namespaces of one machine, bare or as Ray nodes: real addresses, real deaths, real cuts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PORT = 6379
SUBNET = "10.83.61"
START_S = 120.0


def why_not() -> str:
    """Why this machine cannot hold such a cluster, or nothing."""
    if shutil.which("ip") is None:
        return "needs `ip`, of iproute2"
    name = f"shoal-{uuid.uuid4().hex[:6]}"
    made = _ip("netns", "add", name, check=False)
    if made.returncode:
        return f"needs network namespaces: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


@dataclass
class Node:
    """A host with an address of its own. ``run`` and ``spawn`` start processes on it; ``kill`` ends all that it has."""

    namespace: str
    address: str
    env: dict[str, str]

    def spawn(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *command],
                env={**self.env, **env}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def run(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        full = ["ip", "netns", "exec", self.namespace, *command]
        return subprocess.run(full, env={**self.env, **env}, capture_output=True, text=True, timeout=180, check=False)

    def pids(self) -> list[int]:
        return [int(line) for line in _ip("netns", "pids", self.namespace, check=False).stdout.split()]

    def kill(self) -> None:
        """SIGKILL to every process in this host's namespace, which only this cluster has, until none is left."""
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@dataclass
class Cluster:
    """``nodes``, the first of them the head; ``folder`` holds what they write."""

    folder: Path
    bridge: str
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
        """A host on the bridge, with nothing running."""
        number = len(self.nodes) + 1
        node = Node(f"{self.bridge}n{number}", f"{SUBNET}.{number}", self.env)
        self.nodes.append(node)
        _add_host(node, self.bridge, number)
        return node

    def part(self, *nodes: Node) -> None:
        """No packet passes between these nodes any more; each still reaches all others."""
        for node in nodes:
            port = f"{self.bridge}o{self.nodes.index(node) + 1}"
            subprocess.run(["bridge", "link", "set", "dev", port, "isolated", "on"], check=True, capture_output=True)

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
        self._wait_for_nodes(number)
        return node

    def _wait_for_nodes(self, count: int) -> None:
        ask = f"import ray; ray.init(log_to_driver=False); assert sum(n['Alive'] for n in ray.nodes()) == {count}"
        deadline_s = time.monotonic() + START_S
        answer = None
        while time.monotonic() < deadline_s:
            answer = self.head.run([sys.executable, "-c", ask], env={"RAY_ADDRESS": self.address})
            if answer.returncode == 0:
                return
        raise TimeoutError(f"Ray had not {count} nodes within {START_S:g} s: {answer and answer.stderr[-2000:]}")

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        for child in self.children:
            child.wait(30)
        for number, node in enumerate(self.nodes, 1):
            _ip("link", "del", f"{self.bridge}o{number}", check=False)  # else it goes when the kernel gets round to it
            _ip("netns", "del", node.namespace, check=False)
        _ip("link", "del", self.bridge, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def cluster(env: Mapping[str, str]) -> Iterator[Cluster]:
    """A Ray cluster without a node so far. Its processes have ``env`` too. Nothing of it is left afterwards."""
    name = f"sh{uuid.uuid4().hex[:5]}"
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    folder = Path(tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp"))  # short, for Ray's sockets
    made = Cluster(folder, name, {**inherited, **ours, "TMPDIR": str(folder), **env})
    try:
        _ip("link", "add", name, "type", "bridge")
        _ip("link", "set", name, "up")
        yield made
    finally:
        made.close()


def _add_host(node: Node, bridge: str, number: int) -> None:
    inside, outside = f"{bridge}i{number}", f"{bridge}o{number}"
    _ip("netns", "add", node.namespace)
    _ip("link", "add", outside, "type", "veth", "peer", "name", inside)
    _ip("link", "set", inside, "netns", node.namespace)
    _ip("link", "set", outside, "master", bridge, "up")
    for words in (f"addr add {node.address}/24 dev {inside}", f"link set {inside} up", "link set lo up"):
        _ip("-n", node.namespace, *words.split())


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)
