"""The frame: what is installed is pinned, the gate runs, and every link leads somewhere."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.reading import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
TARGETS = ("setup", "demo", "test", "check", "bench", "docs", "clean")


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    listed = [Requirement(text) for text in (*PROJECT["dependencies"], *(text for extra in extras for text in extra))]
    return [requirement for requirement in listed if requirement.name != PROJECT["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_what_the_project_needs_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_torch_is_no_newer_than_what_was_tried() -> None:
    torch = next(requirement for requirement in requirements() if requirement.name == "torch")
    assert torch.specifier.contains(PINS["torch"])
    assert not torch.specifier.contains("2.14.0")


def test_every_target_of_the_makefile_is_there() -> None:
    text = (ROOT / "Makefile").read_text()
    assert not [target for target in TARGETS if not re.search(rf"^{target}:", text, re.MULTILINE)]


def test_the_gate_can_be_run_and_runs_the_targets() -> None:
    gate = ROOT / ".ci" / "run"
    assert os.access(gate, os.X_OK)
    assert [line for line in gate.read_text().splitlines() if line.startswith("make ")] == ["make check", "make test"]


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files, and the headings in them, that a page points to."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            file, _, heading = target.partition("#")
            yield ((ROOT / page).parent / file if file else ROOT / page), heading


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown renderers make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_relative_link_leads_somewhere(files: Sequence[Path]) -> None:
    broken = []
    for page in (path for path in files if path.suffix == ".md"):
        for target, heading in links(page):
            if not target.exists() or (heading and heading not in headings(target)):
                broken.append(f"{page}: {target.name}#{heading}" if heading else f"{page}: {target.name}")
    assert not broken
