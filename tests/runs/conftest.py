from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As the workers have: what torch sums in parallel differs in the last bits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a folder of its own for its runs."""
    monkeypatch.setenv("SHOAL_RUNS", str(tmp_path / "runs"))
