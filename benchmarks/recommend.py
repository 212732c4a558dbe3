"""Recipes with tables on real data: MovieLens-100k as ratings, and card payments as fraud or not, in the order of time.

python -m benchmarks.recommend [--quick]

Ratings: biased factorisation, five folds, 4 workers, ``ParameterServer(Async())``; beside it the plain PyTorch loop of
the same model, rule, batch and epochs in one process, whose embeddings have tables of their own. Fraud: FTRL on hashed
features, the first 80 % of the payments trains and the last 20 % tests; gradient boosting's average precision there is
0.79. ``--quick``: one fold of fewer epochs, and no plain loop.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shoal
from benchmarks.accuracy_traces import table as text_table
from benchmarks.machine import REPOSITORY, finish
from shoal.evaluation import measure, merged
from shoal.job import load_job
from shoal.shards.embedding import embeddings_of

RATINGS, FRAUD = REPOSITORY / "examples" / "05_ratings.py", REPOSITORY / "examples" / "07_fraud_hashed.py"
WORKERS, FOLDS = 4, 5
BOOSTING_AVERAGE_PRECISION = 0.79


def train(path: Path, name: str, workers: int, *settings: str) -> tuple[dict[str, Any], float]:
    """A run's figures, and its seconds."""
    begun_s = time.monotonic()
    options = shoal.TrainOptions(quiet=True)
    run = shoal.train(path, workers=workers, name=name, settings=settings, options=options)
    return dict(run.figures), time.monotonic() - begun_s


def plain(path: Path) -> dict[str, Any]:
    """The job's model by a plain loop in this process."""
    job = load_job(path)
    torch.manual_seed(job.seed)
    model, random = job.task.model(), np.random.default_rng(0)
    num, reader = sum(job.train.block_sizes()), job.train.open()
    from shoal.lanes import Order

    order = Order(job.train.block_sizes(), 1, seed=0, epoch=0)
    everything = reader.gather(order.slice(0, 0, num))
    modules = embeddings_of(model)
    for _ in range(job.epochs or 1):
        for rows in np.array_split(random.permutation(num), -(-num // job.global_batch)):
            batch = tuple(column[rows] for column in everything)
            job.task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            for module in modules:
                module.update()
    assert job.test is not None
    return merged([measure(job, model, job.test.open(), range(job.num_lanes))])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recommend", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    folds = range(1 if options.quick else FOLDS)
    shorter = ["epochs=6"] if options.quick else []
    ours, alone, seconds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SHOAL_RUNS"] = folder
        for fold in folds:
            os.environ["RATINGS_FOLD"] = str(fold)
            figures, took_s = train(RATINGS, f"ratings-{fold}", WORKERS, *shorter)
            ours.append(figures["rmse"])
            seconds.append(took_s)
            print(f"fold {fold}: rmse {ours[-1]:.4f} in {took_s:.0f} s", flush=True)
            if not options.quick:
                alone.append(plain(RATINGS)["rmse"])
        fraud, fraud_s = train(FRAUD, "fraud", 2)
    found: dict[str, Any] = {
        "rmse": round(statistics.mean(ours), 4),
        "rmse_plain": round(statistics.mean(alone), 4) if alone else None,
        "fraud_auc": round(fraud["auc"], 4),
        "fraud_average_precision": round(fraud["average_precision"], 4),
        "boosting_average_precision": BOOSTING_AVERAGE_PRECISION,
        "ratings_s": round(statistics.mean(seconds), 1),
        "fraud_s": round(fraud_s, 1),
    }
    rows = {name: (str(found[name]),) for name in found}
    print(text_table(rows, ("", "")))
    config = {"quick": options.quick, "workers": WORKERS, "folds": len(folds), "rmse_by_fold": ours}
    finish("recommend", found, config)


if __name__ == "__main__":
    main()
