"""Each example is what README says it is: a job that loads, computes and measures."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.errors import ConfigError
from shoal.job import Job, load_job
from shoal.lanes import Order
from shoal.shards.embedding import embeddings_of
from tests.house.reading import ROOT

ROWS = 512
PROGRAMS = {"00_demo.py", "04_ddp_hook.py"}
"""Examples that are no jobs: `make demo` runs the one, tests/comm/test_ddp_hook.py the other."""

EXAMPLES = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))
JOBS = [path for path in EXAMPLES if path.name not in PROGRAMS]


SHOPPERS = ROOT.parent / "shared" / "data" / "seqrec_s3rec" / "Beauty.txt"
"""What the example of the next item is of, where it is."""


@pytest.fixture(params=JOBS, ids=lambda path: path.stem)
def job(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Job:
    path: Path = request.param
    monkeypatch.setenv("NEXT_ITEM_DATA", os.environ.get("NEXT_ITEM_DATA", str(SHOPPERS)))
    try:
        return load_job(path)
    except ConfigError as error:
        if "pip cannot download" in str(error) or "name it with NEXT_ITEM_DATA" in str(error):
            pytest.skip(str(error))
        raise


def test_there_are_examples() -> None:
    assert JOBS


def test_a_job_of_the_examples_computes_on_its_own_data(job: Job) -> None:
    torch.manual_seed(job.seed)
    model = job.task.model()
    reader = job.train.open()
    order = Order(job.train.block_sizes(), job.num_lanes, seed=job.seed, epoch=0)
    try:
        batch = reader.gather(order.slice(0, 0, min(ROWS, order.lane_size(0))))
    finally:
        reader.close()
    loss = job.task.loss(model, batch)
    loss.backward()
    assert loss.ndim == 0
    assert math.isfinite(loss.item())
    rows = [gradients for module in embeddings_of(model) for gradients in module.take_gradients()]
    assert rows or any(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        figures = {name: metric.value() for name, metric in job.task.metrics(model, batch).items()}
    assert figures
    assert all(np.isfinite(value) for value in figures.values() if isinstance(value, float))


def test_the_job_of_the_tutorial_loads(tmp_path: Path) -> None:
    blocks = (ROOT / "docs" / "tutorial.md").read_text().split("```python\n")[1:]
    path = tmp_path / "line.py"
    path.write_text(next(block.partition("```")[0] for block in blocks if "shoal.Job(" in block))
    assert load_job(path).global_batch == 100


def test_a_job_of_the_examples_can_be_measured(job: Job) -> None:
    assert job.test is not None
    assert sum(job.test.block_sizes()) > 0


def test_the_examples_are_numbered_without_a_gap() -> None:
    numbers = [int(path.name[:2]) for path in EXAMPLES]
    assert numbers == list(range(len(EXAMPLES)))


def test_the_job_in_readme_is_one_of_the_examples() -> None:
    block = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    example = (ROOT / "examples" / "01_fashion_mnist.py").read_text()
    pieces = [piece for piece in block.split("\n\n") if piece.strip()]
    assert pieces
    assert not [piece for piece in pieces if piece.strip("\n") not in example]
