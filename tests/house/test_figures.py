"""README claims what was measured, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tables import BEGIN, END, README, TABLES, Figure, render, row

PAGE = f"before\n{BEGIN}\nstale\n{END}\nafter\n"
MACHINE = {"cores": 2, "processor": "a processor", "torch": "2.13.0"}


def keep(folder: Path, name: str, *, quick: bool = False, **figures: float | None) -> None:
    config = {"quick": quick}
    result = {"figures": figures, "config": config, "machine": MACHINE, "measured_at": "2026-01-02T03:04:05+00:00"}
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_readme_shows_the_figures_of_the_files() -> None:
    text = README.read_text()
    assert render(text) == text, "run python -m benchmarks.tables"


def test_a_figure_without_a_file_does_not_appear(tmp_path: Path) -> None:
    assert render(PAGE, tmp_path) == f"before\n{BEGIN}\n{END}\nafter\n"


def test_a_measured_figure_appears_beside_its_bound(tmp_path: Path) -> None:
    keep(tmp_path, "recovery", kill_s=0.3125)
    assert "| a worker killed: seconds | 0.3125 | at most 0.5 |" in render(PAGE, tmp_path)


def test_a_figure_of_a_quick_run_does_not_appear(tmp_path: Path) -> None:
    keep(tmp_path, "recovery", quick=True, kill_s=0.3125)
    assert "0.3125" not in render(PAGE, tmp_path)


def test_rendering_twice_changes_nothing(tmp_path: Path) -> None:
    keep(tmp_path, "overhead", ratio_vs_ddp=1.01)
    keep(tmp_path, "ingest", ratio_vs_dataloader=4.0)
    once = render(PAGE, tmp_path)
    assert render(once, tmp_path) == once


def test_a_figure_that_falls_short_says_so() -> None:
    figure = Figure(key="kill_s", meaning="kill", at_most=0.5)
    assert row(figure, {"kill_s": 0.7}).endswith("at most 0.5: **missed** |")


def test_a_figure_that_was_not_measured_says_so() -> None:
    assert row(Figure(key="ray", meaning="over Ray Data"), {"ray": None}) == "| over Ray Data | not measured |  |"


@pytest.mark.parametrize("name", TABLES)
def test_each_table_is_of_a_benchmark_that_can_be_run(root: Path, name: str) -> None:
    module = root / "benchmarks" / name
    assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
