"""Weights for the models of ``served_models``: for peers as safetensors, for us as a package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.machine import REPOSITORY
from benchmarks.served_models import NUM_FILMS, NUM_USERS, Loaded
from shoal.job import hash_job, load_job
from shoal.serving.package import Description, Package, Probe, TaskRecord, write
from shoal.serving.predictor import make_predictor
from shoal.serving.tables import stored
from shoal.shards.embedding import OwnTables, embeddings_of, specs_of

JOB = REPOSITORY / "benchmarks" / "jobs" / "served.py"
STEPS, BATCH = 8, 64
ROWS = {"users": NUM_USERS, "films": NUM_FILMS, "wide": NUM_USERS + NUM_FILMS}


@dataclass(frozen=True)
class Files:
    """Where a model is, and what it says of its sample, outputs in the order of their names."""

    folder: Path
    weights: Path
    package: Path
    expected: list[float]

    def bare_p50_ms(self, model: str) -> float:
        """What the model by itself takes for its sample, in a process with one thread."""
        words = [sys.executable, "-m", "benchmarks.served_models", model, str(self.weights)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
        return float(json.loads(done.stdout)["p50_ms"])


def write_files(model: str, folder: Path) -> Files:
    """Make them; seconds."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    weights, package = folder / "weights.safetensors", folder / "package"
    with mock.patch.dict(os.environ, SERVED=model):
        task: Any = load_job(JOB).task
    own = task.model()
    if model == "clicks":
        tables = _filled(own)
        tensors = own.state_dict() | _as_torch(tables)
    else:
        tables = None
        _learn(own)
        tensors = own.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    _write_package(model, task, own, tables, package)
    loaded = Loaded(model, str(weights))
    answer = loaded.answer([loaded.kind.sample()])[0]
    return Files(folder, weights, package, [float(x) for name in sorted(answer) for x in np.ravel(answer[name])])


def _learn(model: nn.Module) -> None:
    """A few steps on Fashion-MNIST."""
    group = pq.ParquetFile(REPOSITORY / "examples" / "data" / "test.parquet").read_row_group(0)
    pixels = np.frombuffer(b"".join(group["image"].to_pylist()), np.uint8).reshape(-1, 1, 28, 28)
    images, labels = torch.from_numpy(pixels.copy()), torch.from_numpy(group["label"].to_numpy().astype(np.int64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(labels)
        optimizer.zero_grad()
        cross_entropy(model((images[rows].float() / 255 - 0.286) / 0.353), labels[rows]).backward()
        optimizer.step()


def _filled(model: nn.Module) -> OwnTables:
    """Tables in which every id is known, by a gradient of nothing; rows are what they began as."""
    tables = OwnTables(specs_of(embeddings_of(model)))
    for name, table in tables.tables.items():
        ids = np.arange(ROWS[name])
        table.push(ids, np.zeros((len(ids), table.spec.dim), np.float32))
    for module in embeddings_of(model):
        module.source = tables
    return tables


def _as_torch(tables: OwnTables) -> dict[str, Tensor]:
    """The same rows, as torch's modules keep them."""
    return {
        f"{name}.weight": torch.from_numpy(np.array(tables.pull(name, np.arange(num)))) for name, num in ROWS.items()
    }


def _write_package(model: str, task: Any, own: nn.Module, tables: OwnTables | None, folder: Path) -> None:
    images = [table.image() for table in tables.tables.values()] if tables else []
    with mock.patch.dict(os.environ, SERVED=model):
        served = make_predictor(task, own.state_dict(), name=model, version=1)
        record = TaskRecord(name=type(task).__name__, job_file=JOB.name, revision=hash_job(JOB))
    described = Description(
        name=model, version=1, created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs=list(served.inputs), outputs=list(served.outputs), task=record, metrics={}, lineage={},
        tables=[image.meta() for image in images],
    )  # fmt: skip
    package = Package(
        description=described, tensors=own.state_dict(), probe=Probe(), tables=[stored(image) for image in images]
    )  # fmt: skip
    write(package, folder)
