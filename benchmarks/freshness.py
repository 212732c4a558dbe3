"""A live run with sparse tables, followed by a server: how long until what was committed is served?

python -m benchmarks.freshness [--quick]

A worker and two table shards train on clicks with a table of a million ids, and store a version about every second; a
service follows the run. Its gate looks for skew and replays requests; there is neither shadow nor canary. A client asks
every 10 ms. ``fresh_p50_s`` and ``fresh_p99_s``: from when a version was committed (its manifest's time, before
anything of it is written) until an answer is of it or of a later one, once each of the service's processes has held a
version: before that they load all of the tables, ``first_p50_s``. ``by_delta``: the part of the versions since then of
whose tables only what is new was read. All of it runs on one machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.machine import REPOSITORY, finish
from benchmarks.rollout import SHOAL, serving
from shoal.launch.run import Run, find_run
from shoal.versions import Store, Versions

JOB = REPOSITORY / "benchmarks" / "fresh_job.py"
ASKED_EVERY_S, STARTS_S = 0.01, 60.0
POLICY = ["--shadow", "0", "--canary", "none"]


def committed(store: Versions, known: dict[int, float]) -> None:
    """When each stored version was: wall time by step."""
    for step in store.steps():
        if step not in known:
            known[step] = datetime.fromisoformat(store.manifest(step).created_at).timestamp()


def watch(url: str, store: Versions, process: subprocess.Popen[bytes], most_s: float) -> tuple[Any, dict[int, float]]:
    """When an answer was first of each version that answered, and when each was committed."""
    first: dict[int, float] = {}
    known: dict[int, float] = {}
    body = json.dumps({"inputs": [{"name": "ids", "datatype": "INT64", "shape": [1, 8], "data": list(range(8))}]})
    failed, until_s = 0, time.monotonic() + most_s
    with httpx.Client() as client:
        while process.poll() is None and time.monotonic() < until_s:
            answer = client.post(f"{url}/infer", content=body)
            failed += answer.status_code != 200
            if answer.status_code == 200:
                first.setdefault(int(answer.json()["model_version"]), time.time())
            committed(store, known)
            time.sleep(ASKED_EVERY_S)
    return (first, failed), known


def waited(first: dict[int, float], known: dict[int, float], begin_s: float, end_s: float = math.inf) -> list[float]:
    """For each version that was committed within this time, seconds until it or a later one was served."""
    steps = sorted(first)
    found = []
    for step, at_s in sorted(known.items()):
        place = bisect_left(steps, step)
        if place < len(steps) and begin_s <= at_s < end_s:
            found.append(first[steps[place]] - at_s)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.freshness", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as name:
        os.environ["SHOAL_RUNS"] = name
        command = [*SHOAL, "train", str(JOB), "--workers", "1", "--name", "clicks", "--quiet"]
        process = subprocess.Popen(command, cwd=REPOSITORY)
        try:
            store = Versions(Store(str(Path(name) / "clicks")))
            until_s = time.monotonic() + STARTS_S
            while store.newest() is None:
                if process.poll() is not None or time.monotonic() > until_s:
                    raise SystemExit("the run stored no version")
                time.sleep(0.1)
            run = Run(find_run("clicks").path)
            with serving(run, POLICY) as (folder, url):
                (first, failed), known = watch(url, store, process, 20.0 if quick else 90.0)
                events = [json.loads(line) for line in folder.events_path.read_text().splitlines()]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    loads = [event for event in events if event["kind"] == "loaded"]
    new = [load["at_s"] for n, load in enumerate(loads) if not any(load["pids"] == b["pids"] for b in loads[:n])]
    warm_s = new[-1]
    loaded = [load["by_delta"] for load in loads if load["at_s"] > warm_s]
    refused = [event for event in events if event["kind"].endswith("_refused")]
    for event in refused:
        print(event, file=sys.stderr)
    times, early = waited(first, known, warm_s), waited(first, known, min(first.values()), warm_s)
    if not times or not loaded:
        raise SystemExit("no version was committed once all processes had held one")
    figures = {
        "fresh_p50_s": round(float(np.percentile(times, 50)), 3),
        "fresh_p99_s": round(float(np.percentile(times, 99)), 3),
        "first_p50_s": round(float(np.percentile(early, 50)), 3) if early else None,
        "committed": len(times),
        "served": len(first),
        "by_delta": round(sum(loaded) / len(loaded), 3),
        "refused": len(refused),
        "failed_requests": failed,
    }
    finish("freshness", figures, {"quick": quick, "policy": POLICY})


if __name__ == "__main__":
    main()
