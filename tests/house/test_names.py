"""Names tell what a thing is about, and every public one says what it promises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.house.reading import ROOT, Module

EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "core", "managers", "manager", "misc"}

PRIVATE_PLACES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (r"(?<![\w./-])/(?:work|root|home/\w+)/", r"\bfarm[-_]", r"\bpypi\.org\b", r"\bpythonhosted\b")
]
"""Paths and hosts of one machine or one workplace mean nothing to who reads this elsewhere."""


def test_no_file_or_folder_has_an_empty_name(files: Sequence[Path]) -> None:
    assert not [str(path) for path in files if EMPTY_NAMES & set(path.with_suffix("").parts)]


def test_folders_of_the_package_are_two_deep_at_most(package_modules: Sequence[Module]) -> None:
    assert not [m.name for m in package_modules if m.name.count(".") > 2]


def test_nothing_names_a_place_of_its_authors(files: Sequence[Path]) -> None:
    found = []
    for path in files:
        try:
            lines = (ROOT / path).read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path}:{n}" for n, text in enumerate(lines, 1) if any(p.search(text) for p in PRIVATE_PLACES)]
    assert not found


@pytest.mark.parametrize("pieces", [["/work", "/x"], ["'/root", "/.cache'"], ["farm", "-image"], ["pypi", ".org"]])
def test_a_place_of_its_authors_is_seen(pieces: list[str]) -> None:
    assert any(pattern.search("see " + "".join(pieces)) for pattern in PRIVATE_PLACES)


def test_a_folder_called_work_is_nothing_private() -> None:
    assert not any(pattern.search("/".join(["examples", "work", "job.py"])) for pattern in PRIVATE_PLACES)


def undocumented(module: Module) -> Iterator[str]:
    """The module, and its public classes and functions, that have no docstring."""
    if not ast.get_docstring(module.tree) and module.tree.body:
        yield module.name
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            is_entry = node.name == "main"
            if not ast.get_docstring(node) and not is_entry:
                yield f"{module.name}.{node.name}"


def test_every_public_name_says_what_it_promises(package_modules: Sequence[Module]) -> None:
    assert not [name for module in package_modules for name in undocumented(module)]
