"""The main job in one go: train on all of Fashion-MNIST, lose a worker on purpose, measure, serve, predict.

make demo
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import shoal
from shoal.launch.run import runs_folder
from shoal.serving import Server, predict
from shoal.testing import FaultPlan, Inflicted
from shoal.training.folder import RunFolder

JOB = Path(__file__).parent / "01_fashion_mnist.py"
TEST = Path(__file__).parent / "data" / "test.parquet"
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
KILL_AT_STEP = 300  # of 705: in the middle of the second epoch


def train() -> tuple[shoal.Run, Inflicted]:
    """Train with two workers and kill one on the way."""
    name = time.strftime("demo-%Y%m%d-%H%M%S")
    plan = FaultPlan().kill(at_step=KILL_AT_STEP, rank=1)
    with plan.befalling(RunFolder((runs_folder() / name).resolve())) as inflicted:
        run = shoal.train(JOB, workers=2, name=name, settings=["log_every_steps=5"])
    return run, inflicted[0]


def cost_of(run: shoal.Run, hit: Inflicted) -> str:
    """What the kill cost, from the run's events and the account in its last version."""
    formed_s = next(e["at_s"] for e in run.events if e["kind"] == "generation" and e["at_s"] > hit.at_s)
    healed_s = next((e["at_s"] for e in run.events if e["kind"] == "healed" and e["at_s"] > hit.at_s), None)
    account = shoal.account(run)
    replaced = f"its replacement had caught up after {healed_s - hit.at_s:.2f} s" if healed_s else "it was not replaced"
    return (
        f"killing {hit.worker} at step {KILL_AT_STEP} cost: {formed_s - hit.at_s:.2f} s until the others went on "
        f"({replaced}), samples lost {account.lost}, samples repeated {account.repeated}"
    )


def main() -> int:
    began_s = time.monotonic()
    run, hit = train()
    print(cost_of(run, hit))
    print(f"test accuracy {run.figures['accuracy']:.4f} on 10,000 images it has never seen")

    row = pq.read_table(TEST).slice(0, 1)
    image = np.frombuffer(row["image"][0].as_py(), np.uint8).reshape(1, 1, 28, 28).copy()
    with Server(shoal.predictor(run)) as server:
        answer = predict(server.model_url, {"image": image})
    label = int(answer["label"][0])
    certainty = float(answer["probabilities"][0, label])
    print(
        f"served at {server.model_url}: asked for the first test image, it says {NAMES[label]!r}, {certainty:.0%} sure"
    )
    print(f"the image's label is {NAMES[row['label'][0].as_py()]!r}")
    print(f"all of it took {time.monotonic() - began_s:.0f} s; try `shoal status {run.name} --events`")
    return 0 if run.figures["accuracy"] >= 0.90 else 1


if __name__ == "__main__":
    sys.exit(main())
