"""A table of a million rows and a small dense net, by 4 workers and 2 shards on hosts that 1 Gbit/s links join.

python -m benchmarks.sparse_training [--quick]

Against torch's DistributedDataParallel with a dense gradient of the table, and with a sparse one: on the same hosts,
the same batches, optimizer and initial parameters. A step's time is the median of those that were measured; ours is of
steps 10 apart, from the event log. AUC is after as many samples, against the plain PyTorch loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import shoal
from benchmarks.accuracy_runs import ENVIRONMENT, HOSTS, _wait
from benchmarks.accuracy_traces import table as text_table
from benchmarks.machine import REPOSITORY, finish
from benchmarks.sparse_job import GLOBAL_BATCH
from shoal.lab import Lab, LabSpec

LINK = "1gbit"
JOB = Path(__file__).parent / "sparse_job.py"


def ours(lab: Lab, folder: Path, strategy: str, steps: int) -> tuple[float, float, float]:
    """Seconds a step, the AUC at the end, and the bytes that a host sent a step."""
    os.environ.update({
        **lab.env, "SHOAL_RUNS": str(folder), "PYTHONPATH": str(REPOSITORY),
        "SPARSE_STRATEGY": strategy, "SPARSE_STEPS": str(steps),
    })  # fmt: skip
    before = sum(lab.bytes(host)[0] for host in lab.hosts)
    run = shoal.train(JOB, workers=HOSTS, on="hosts", name=strategy, options=shoal.TrainOptions(quiet=True))
    sent = (sum(lab.bytes(host)[0] for host in lab.hosts) - before) / HOSTS / steps
    told = [(e["at_s"], e["step"]) for e in run.events if e["kind"] == "progress"]
    times = [(later[0] - before[0]) / (later[1] - before[1]) for before, later in pairwise(told)]
    return statistics.median(times[1:]), run.figures["auc"], sent


def torchs(lab: Lab, folder: Path, steps: int, *flags: str) -> tuple[float, float]:
    """Seconds a step of DDP on all hosts, and the bytes that a host sent a step."""
    place = Path(tempfile.mkdtemp(dir=folder))
    before = sum(lab.bytes(host)[0] for host in lab.hosts)
    module = [sys.executable, "-m", "benchmarks.sparse_ddp"]
    with (place / "log").open("w") as log:
        workers = [
            host.popen(
                [*module, str(host.number), str(HOSTS), str(place), str(steps), *flags],
                env=ENVIRONMENT, cwd=REPOSITORY, stdout=log, stderr=log,
            )
            for host in lab.hosts
        ]  # fmt: skip
        _wait("DDP", workers, place / "log")
    sent = (sum(lab.bytes(host)[0] for host in lab.hosts) - before) / HOSTS / (steps + 1)
    times = json.loads((place / "result.json").read_text())["times"]
    return statistics.median(times[1:]), sent


def plain_auc(lab: Lab, folder: Path, steps: int) -> float:
    """The plain loop's, after as many steps."""
    place = Path(tempfile.mkdtemp(dir=folder))
    words = [sys.executable, "-m", "benchmarks.sparse_ddp", "0", "1", str(place), str(steps), "--sparse"]
    lab.hosts[0].run(words, ENVIRONMENT, cwd=REPOSITORY, check=True, timeout=600)
    return float(json.loads((place / "result.json").read_text())["auc"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_training", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    steps, torch_steps = (60, 3) if options.quick else (400, 8)
    strategies = ("hybrid",) if options.quick else ("hybrid", "sync")
    with tempfile.TemporaryDirectory() as name, Lab(LabSpec(hosts=HOSTS, link=LINK, warm=True)) as lab:
        folder = Path(name)
        found = {strategy: ours(lab, folder, strategy, steps) for strategy in strategies}
        dense = torchs(lab, folder, torch_steps)
        sparse = torchs(lab, folder, 4 * torch_steps, "--sparse")
        auc = plain_auc(lab, folder, steps)
    step_s = found["hybrid"][0]
    figures: dict[str, Any] = {
        "speedup_vs_dense_allreduce": round(dense[0] / step_s, 2),
        "speedup_vs_sparse_allreduce": round(sparse[0] / step_s, 2),
        "samples_per_s": round(GLOBAL_BATCH / step_s),
        "auc_difference": round(max(abs(one[1] - auc) for one in found.values()), 5),
        "auc": {name: round(one[1], 4) for name, one in found.items()} | {"plain": round(auc, 4)},
        "step_s": {name: round(one[0], 4) for name, one in found.items()}
        | {"ddp_dense": round(dense[0], 4), "ddp_sparse": round(sparse[0], 4)},
        "sent_bytes_a_step": {name: round(one[2]) for name, one in found.items()}
        | {"ddp_dense": round(dense[1]), "ddp_sparse": round(sparse[1])},
    }
    rows = {
        name: (f"{1e3 * figures['step_s'][name]:.1f}", f"{figures['sent_bytes_a_step'][name] / 1e6:.2f}")
        for name in figures["step_s"]
    }
    print(text_table(rows, ("", "ms a step", "MB a host a step")))
    finish("sparse_training", figures, {"quick": options.quick, "link": LINK, "steps": steps, "hosts": HOSTS})


if __name__ == "__main__":
    main()
