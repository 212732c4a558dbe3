"""The project's own files, read as data."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Module:
    """One Python file of the project: its path from the root, its dotted name if it is in ``src``, and its syntax."""

    path: Path
    name: str
    tree: ast.Module
    num_lines: int

    @property
    def package(self) -> str:
        """What stands on a floor: ``comm`` for ``shoal.comm.link``, nothing for ``shoal`` itself."""
        return self.name.split(".")[1] if "." in self.name else ""


def parse(path: Path, text: str) -> Module:
    """A file's text as a module."""
    parts = path.with_suffix("").parts
    name = ".".join(part for part in parts[1:] if part != "__init__") if parts[0] == "src" else ""
    return Module(path, name, ast.parse(text), text.count("\n"))


def git_files() -> Sequence[Path] | None:
    """Every file that git tracks or would track, from the root; None outside a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        return None
    paths = sorted({Path(line) for line in listed.stdout.splitlines()})
    return [path for path in paths if (ROOT / path).is_file()]
