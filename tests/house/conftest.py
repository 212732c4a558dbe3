from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.house.reading import ROOT, Module, git_files, parse


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def files() -> Sequence[Path]:
    """Every file of the project, from the root."""
    found = git_files()
    if found is None:
        pytest.skip("the house is inspected in a git checkout, and this is none")
    return found


@pytest.fixture(scope="session")
def modules(files: Sequence[Path]) -> Sequence[Module]:
    """Every Python file: the package, the tests, the examples, the benchmarks."""
    return [parse(path, (ROOT / path).read_text()) for path in files if path.suffix == ".py"]


@pytest.fixture(scope="session")
def package_modules(modules: Sequence[Module]) -> Sequence[Module]:
    """The modules of ``shoal``."""
    return [module for module in modules if module.name]
