"""A node of Ray on each host of a lab."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import ConfigError, Fault
from shoal.lab.cluster import Host, Lab

PORT = 6379
_START_S = 180
_OBJECT_STORE_BYTES = 100_000_000
_WAIT = """
import sys, time, ray
ray.init(log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.1)
"""


def start_ray(lab: Lab) -> dict[str, str]:
    """Start the nodes, host 0 the head, and wait until Ray counts them all; 5 to 10 s, and 0.75 GB a node.

    The environment that a command on host 0 needs to use the cluster. It asks for a token, which is made for this lab:
    others on this machine reach the hosts' addresses, too. ``ConfigError`` if Ray is not installed.
    """
    ray = _command()
    folder = Path(tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp"))  # short, for the names of Ray's sockets
    lab.keep(msgspec.structs.replace(lab.record, folder=str(folder)))
    env = {
        "RAY_ADDRESS": f"{lab.hosts[0].address}:{PORT}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "SHOAL_LAB": lab.name,
        "TMPDIR": str(folder),
    }
    for host in lab.hosts:
        _start(ray, lab, host, env, folder)
        if host.number == 0:
            _wait_for(1, lab, env, folder)
    _wait_for(len(lab.hosts), lab, env, folder)
    return env


def _command() -> str:
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if found is None:
        raise ConfigError("a lab with Ray needs Ray, which is not installed here: pip install 'shoal[ray]'")
    return found


def _start(ray: str, lab: Lab, host: Host, env: dict[str, str], folder: Path) -> None:
    where = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder}"]
    if host.number:
        where = [f"--address={env['RAY_ADDRESS']}"]
    cores = lab.record.hosts[host.number].cores or os.cpu_count() or 1
    size = [f"--num-cpus={max(1, round(cores))}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
    command = [ray, "start", "--block", "--disable-usage-stats", f"--node-ip-address={host.address}", *where, *size]
    own = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
    with (folder / f"{host.name}.log").open("ab") as log:
        host.popen(command, own, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _wait_for(num_nodes: int, lab: Lab, env: dict[str, str], folder: Path) -> None:
    ask: list[Any] = [sys.executable, "-c", _WAIT, str(num_nodes)]
    try:
        asked = lab.hosts[0].run(ask, env, capture_output=True, text=True, timeout=_START_S)
    except subprocess.TimeoutExpired:
        said = "\n".join(path.read_text()[-500:] for path in sorted(folder.glob("*.log")))
        raise Fault(f"Ray had not {num_nodes} nodes within {_START_S} s: {said}") from None
    if asked.returncode:
        raise Fault(f"Ray's head on {lab.hosts[0].name} cannot be used: {asked.stderr[-1000:]}")
