from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.cli import main


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As the workers have: what torch sums in parallel differs in the last bits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a folder of its own for its runs."""
    monkeypatch.setenv("SHOAL_RUNS", str(tmp_path / "runs"))


@dataclass(frozen=True)
class Answer:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """The JSON on the last line."""
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command ``shoal``, in this process."""

    def run(*arguments: object) -> Answer:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Answer(int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def job_file(tmp_path: Path) -> Callable[..., Path]:
    """``line.py`` as ``job.py`` in a folder of its own, with pieces of its text replaced."""

    def write(replaced: Mapping[str, str] | None = None) -> Path:
        text = (Path(__file__).parent / "line.py").read_text()
        for old, new in (replaced or {}).items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "job.py"
        path.write_text(text)
        return path

    return write
