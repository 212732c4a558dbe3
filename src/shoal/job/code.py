"""Which files a job's code is, and its revision."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

_OWN = Path(__file__).resolve().parents[1]


def files_of(path: Path) -> list[Path]:
    """The code of a job: its file, and what that and they import of the file's folder, at the top or within a function.

    Read from the text, so that it is the same in every process, whatever else that has loaded. A module whose name is
    only computed (``importlib.import_module(name)``) is not seen.
    """
    main = path.resolve()
    folder = main.parent
    roots = _roots(folder)
    found: set[Path] = set()
    todo = [(main, "")]
    while todo:
        file, package = todo.pop()
        if file in found:
            continue
        found.add(file)
        for name in _imports(file, package):
            todo += (item for item in _files(name, roots) if _OWN not in item[0].parents)
    return sorted(f for f in found if folder in f.parents and "site-packages" not in f.parts)


def hash_job(path: Path) -> str:
    """A digest of the job's code: its revision."""
    folder = path.resolve().parent
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _roots(folder: Path) -> list[Path]:
    """The folders that modules in ``folder`` are imported from: itself, and what of Python's path is above or in it,
    but for what is installed."""
    places = [Path(entry).resolve() for entry in sys.path]
    installed = {Path(place) for place in (sys.prefix, sys.base_prefix)}
    above = [place for place in places if place in folder.parents]
    below = [place for place in places if folder in place.parents and not installed.intersection(place.parents)]
    return list(dict.fromkeys([folder, *above, *below]))


def _imports(file: Path, package: str) -> Iterator[str]:
    """The full names that a file in ``package`` imports; of ``from a import b`` also ``a.b``, which may be a module."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError):
        return  # importing it tells
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join(part for part in [*above, node.module] if part)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if base)


def _files(name: str, roots: list[Path]) -> Iterator[tuple[Path, str]]:
    """The files that importing a module runs, each with the package that its relative imports start at."""
    parts = name.split(".")
    for root in roots:
        top = root / parts[0]
        if parts[0] and (top.is_dir() or top.with_suffix(".py").is_file()):
            for count in range(1, len(parts) + 1):
                place, full = root.joinpath(*parts[:count]), ".".join(parts[:count])
                if (inside := place / "__init__.py").is_file():
                    yield inside.resolve(), full
                elif (module := place.with_name(f"{place.name}.py")).is_file():
                    yield module.resolve(), ".".join(parts[: count - 1])
            return
