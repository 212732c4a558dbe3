"""The public names, written down: one is added or removed on purpose, or not at all."""

from __future__ import annotations

import importlib
import inspect

import shoal
from tests.house.public import GOLDEN, public_names


def test_the_public_names_are_those_written_down() -> None:
    written, found = set(GOLDEN.read_text().split()), set(public_names())
    assert found == written, (
        f"new: {sorted(found - written)}; gone: {sorted(written - found)}. If that is meant, say so in "
        "CHANGELOG.md and run python -m tests.house.public"
    )


def test_every_public_name_is_there() -> None:
    for name in GOLDEN.read_text().split():
        package, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(package), attribute), name


def test_the_face_of_the_package_is_documented() -> None:
    named = {name: getattr(shoal, name) for name in shoal.__all__}
    made = {name: value for name, value in named.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert not [name for name, value in made.items() if not inspect.getdoc(value)]
