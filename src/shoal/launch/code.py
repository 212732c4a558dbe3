"""A job's code on its way to machines that do not have it: as text, and back into files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory


@dataclass(frozen=True)
class Code:
    """The job file and the modules of its folder that it imported. ``texts`` are by their names in ``folder``."""

    folder: str
    main: str
    cwd: str
    texts: dict[str, bytes] = field(repr=False)

    @staticmethod
    def of(job_file: Path, files: Sequence[str]) -> Code:
        """Read ``files``, which lie in the job file's folder."""
        path = job_file.resolve()
        texts = {Path(file).relative_to(path.parent).as_posix(): Path(file).read_bytes() for file in files}
        return Code(str(path.parent), path.name, os.getcwd(), texts)

    @contextmanager
    def unpacked(self) -> Iterator[Path]:
        """The job file on this machine: where it was, if this machine has the same there (one machine, or a shared file
        system), else in a temporary folder. Relative paths then mean what they meant where the run was started, or
        nothing: the process works in that folder meanwhile."""
        home = Path(self.folder)
        if os.path.isdir(self.cwd) and all(_holds(home / name, text) for name, text in self.texts.items()):
            with chdir(self.cwd):
                yield home / self.main
            return
        with TemporaryDirectory(prefix="shoal-") as spare, chdir(spare):
            for name, text in self.texts.items():
                path = Path(spare, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text)
            yield Path(spare, self.main)


def _holds(path: Path, text: bytes) -> bool:
    try:
        return path.read_bytes() == text
    except OSError:
        return False
