"""Ten new versions of a model that is being asked all the while, and processes that are killed: does any request fail?

python -m benchmarks.rollout [--quick]

A service of two processes follows a run. Ten versions are stored one after another; each is to pass its gate (accuracy
no less than the live one's by 0.02, no skew, no failure on replayed requests), a shadow and a canary. One of them is
worse and one ends the process that loads it. Then the live version is rolled back by hand: ``rollback_s`` is from the
demand until requests are answered by the version before. Then one of the two processes is killed every 2 seconds. A
load generator asks over 8 connections all the while; ``failed_requests`` are all that were not answered with 200.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

import shoal
from benchmarks.load import Load, Target, load
from benchmarks.machine import REPOSITORY, finish
from shoal.launch.services import ServiceFolder, told
from shoal.versions import Snapshot, Store, Versions

JOB = REPOSITORY / "benchmarks" / "rollout_job.py"
SWAPS, WORSE, DEADLY, EVERY_STEPS = 10, 4, 7, 100
"""Of the ten, the fourth is worse and the seventh ends its process."""
SHOAL = [sys.executable, "-c", "import sys; from shoal.cli import main; sys.exit(main())"]
CONNECTIONS, KILLED_EVERY_S, LONGEST_S = 8, 2.0, 60.0


def altered(snapshot: Snapshot, number: int) -> Snapshot:
    """The next version: a little other than the one before it, or what it should not be."""
    change = torch.Generator().manual_seed(number)
    model: dict[str, Tensor] = {}
    for name, tensor in snapshot.model.items():
        if name == "deadly":
            model[name] = torch.ones(()) if number == DEADLY else tensor
        else:
            noise = torch.randn(tensor.shape, generator=change)
            model[name] = noise if number == WORSE else tensor + 1e-3 * noise
    step = snapshot.step + number * EVERY_STEPS
    return Snapshot(step, model, snapshot.optimizer, {**snapshot.meta, "fingerprint": f"{number:016x}"})


@contextmanager
def serving(run: shoal.Run, policy: list[str]) -> Iterator[tuple[ServiceFolder, str]]:
    """Within this the service runs: its folder, and where its model is."""
    command = [*SHOAL, "serve", str(run.path), "--port", "0", "--follow", *policy]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("serving at "):
                    break
                print(line, end="", file=sys.stderr)
            else:
                raise SystemExit("the service did not start")
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield ServiceFolder(run.path.parent / ".services" / run.name), line.split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


class Asking:
    """Asks in a thread, until it is told that what goes on is over."""

    def __init__(self, target: Target, part_s: float) -> None:
        self.parts: list[Load] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(target, part_s))
        self._thread.start()

    def _ask(self, target: Target, part_s: float) -> None:
        while not self._over.is_set():
            self.parts.append(load(target, connections=CONNECTIONS, duration_s=part_s))

    def end(self) -> tuple[int, int]:
        """Requests, and of them those that were not answered with 200."""
        self._over.set()
        self._thread.join()
        num = sum(sum(part.by_status.values()) + part.errors for part in self.parts)
        return num, num - sum(part.by_status.get(200, 0) for part in self.parts)


def until(folder: ServiceFolder, version: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The event of one of these kinds about a version, once it is there."""
    deadline_s = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline_s:
        for line in folder.events_path.read_text().splitlines():
            event = json.loads(line)
            if event["kind"] in kinds and event.get("version") == version:
                return dict(event)
        time.sleep(0.02)
    raise SystemExit(f"nothing was decided about version {version} within {LONGEST_S} s")


def swap(run: shoal.Run, folder: ServiceFolder, snapshot: Snapshot) -> dict[int, str]:
    """What became of each of the ten."""
    versions = Versions(Store(str(run.path)), keep_last=SWAPS + 2)
    decided = {}
    kinds = ("promoted", "gate_refused", "load_refused", "shadow_refused", "canary_refused")
    for number in range(1, SWAPS + 1):
        new = altered(snapshot, number)
        versions.write(new)
        event = until(folder, new.step, kinds)
        decided[number] = str(event["kind"])
        print(f"version {number:2}: {event['kind']}: {'; '.join(event['reasons'])}", file=sys.stderr)
    return decided


def roll_back(folder: ServiceFolder, url: str, body: bytes) -> float:
    """Seconds from the demand until an answer is of another version."""
    headers = {"Authorization": f"Bearer {folder.key_path.read_text().strip()}"}
    with httpx.Client() as client:

        def version() -> str:
            return str(client.post(f"{url}/infer", content=body).json()["model_version"])

        before = version()
        client.get(folder.read().admin_url + "/status", headers=headers).raise_for_status()  # it is connected
        begun_s = time.perf_counter()
        client.post(folder.read().admin_url + "/rollback", headers=headers).raise_for_status()
        while version() == before:
            time.sleep(0.001)
        return time.perf_counter() - begun_s


def kill(folder: ServiceFolder, num: int) -> int:
    """One of the live version's processes every 2 s."""
    killed = 0
    for number in range(num):
        status = told(folder, "GET", "/status")
        pids = status["loaded"][str(status["live"])]["pids"]
        if pids:
            os.kill(pids[number % len(pids)], signal.SIGKILL)
            killed += 1
        time.sleep(KILLED_EVERY_S)
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    requests = 20 if quick else 100
    policy = ["--replicas", "2", "--gate", "accuracy>=live-0.02", "--shadow", str(requests)]
    policy += ["--canary", "0.2,0.5", "--canary-requests", str(requests), "--stage", "60"]
    with tempfile.TemporaryDirectory() as name:
        os.environ["SHOAL_RUNS"] = name
        run = shoal.train(JOB, workers=1, name="clothes", options=shoal.TrainOptions(quiet=True))
        snapshot = Versions(Store(str(run.path))).read()
        image = torch.zeros(784, dtype=torch.int64).tolist()
        body = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 28, 28], "data": image}]}
        path = Path(name) / "body.json"
        path.write_text(json.dumps(body))
        with serving(run, policy) as (folder, url):
            asking = Asking(Target(url=f"{url}/infer", body=path), 2.0)
            decided = swap(run, folder, snapshot)
            rollback_s = roll_back(folder, url, path.read_bytes())
            swapped = asking.end()
            asking = Asking(Target(url=f"{url}/infer", body=path), 2.0)
            killed = kill(folder, 4 if quick else 10)
            endured = asking.end()
    bad = {number: decided[number] for number in (WORSE, DEADLY)}
    figures = {
        "failed_requests": swapped[1] + endured[1],
        "failed_in_swaps": swapped[1],
        "failed_in_kills": endured[1],
        "requests": swapped[0] + endured[0],
        "swaps": sum(kind == "promoted" for kind in decided.values()),
        "worse_version": bad[WORSE],
        "deadly_version": bad[DEADLY],
        "rollback_s": round(rollback_s, 3),
        "killed": killed,
    }
    finish("rollout", figures, {"quick": quick, "replicas": 2, "connections": CONNECTIONS, "policy": policy})


if __name__ == "__main__":
    main()
