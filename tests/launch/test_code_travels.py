from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.job import files_of
from shoal.launch.code import Code
from shoal.launch.rehearsal import prepared

JOB = """
import numpy as np
import torch
import shoal
from travelling_parts.sizes import ROWS

class Task:
    def model(self): return torch.nn.Linear(2, 1)
    def loss(self, model, batch): return model(batch[0]).square().mean()
    def metrics(self, model, batch): return {}

data = shoal.Arrays(np.ones((ROWS, 2), np.float32))
job = shoal.Job(task=Task(), train=data, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), global_batch=4, epochs=1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A job in two files, one of them in a package. What loading it leaves in this process is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "job"
    (folder / "travelling_parts").mkdir(parents=True)
    (folder / "travelling_parts" / "__init__.py").touch()
    (folder / "travelling_parts" / "sizes.py").write_text("ROWS = 8\n")
    (folder / "job.py").write_text(JOB)
    (folder / "beside.py").write_text("is_imported = False\n")
    yield folder
    forget_modules()


def forget_modules() -> None:
    for name in [name for name in sys.modules if name.startswith(("travelling_parts", "shoal_job"))]:
        del sys.modules[name]


def test_it_is_the_same_revision_on_a_machine_without_its_folder(folder: Path) -> None:
    _, revision = prepared(folder / "job.py", [])
    code = Code.of(folder / "job.py", [str(file) for file in files_of(folder / "job.py")])
    shutil.rmtree(folder)
    forget_modules()
    with code.unpacked() as file:
        assert prepared(file, [])[1] == revision
        assert Path.cwd() == file.parent
    assert not file.parent.exists()


def test_only_what_the_job_imports_travels(folder: Path) -> None:
    prepared(folder / "job.py", [])
    code = Code.of(folder / "job.py", [str(file) for file in files_of(folder / "job.py")])
    assert sorted(code.texts) == ["job.py", "travelling_parts/__init__.py", "travelling_parts/sizes.py"]


def test_where_the_same_code_lies_already_it_is_used_in_place(folder: Path) -> None:
    code = Code.of(folder / "job.py", [str(folder / "job.py")])
    with code.unpacked() as file:
        assert file == folder / "job.py"
        assert os.getcwd() == code.cwd


def test_where_other_code_lies_it_is_not_used(folder: Path) -> None:
    code = Code.of(folder / "job.py", [str(folder / "job.py")])
    (folder / "job.py").write_text("another = 1\n")
    with code.unpacked() as file:
        assert file.read_text() == JOB
