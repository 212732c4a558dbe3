"""A worker on a machine that got only the job's code and a posting: what it is told, and how it works."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.comm.keys import JobKey
from shoal.errors import ConfigError, ShoalError
from shoal.launch.code import Code


@dataclass(frozen=True, kw_only=True)
class Posting:
    """What a worker is told. ``folder``: the run's, if versions go there, for then this machine must have it too."""

    name: str
    address: str
    key: JobKey
    store: str
    folder: str | None
    settings: tuple[str, ...]
    torch: str


def serve(code: Code, posting: Posting, host: str) -> tuple[int, str]:
    """Be a worker that others reach at ``host``, to the end of the run. The exit code, and the last line of output."""
    heard = _Overheard(sys.stdout)
    with code.unpacked() as job_file, redirect_stdout(heard):
        try:
            exit_code = _work(job_file, posting, host)
        except ShoalError as error:
            print(f"error: {error}")
            exit_code = error.exit_code
    hint = f" (on node {host}; a job's data need absolute paths or URLs that every node has)"
    return exit_code, heard.last + (hint if exit_code == ConfigError.exit_code else "")


def _work(job_file: Path, posting: Posting, host: str) -> int:
    import torch

    from shoal.launch.rehearsal import prepared
    from shoal.launch.working import work
    from shoal.training.kit import Assignment

    if torch.__version__ != posting.torch:
        raise ConfigError(f"this node has torch {torch.__version__}, and the run {posting.torch}; install the same")
    if posting.folder is not None and not os.path.isdir(posting.folder):
        raise ConfigError(
            f"versions go to {posting.folder}, which this node has not; give --store a URL that all reach"
        )
    job, job_hash = prepared(job_file, posting.settings)
    assignment = Assignment(
        name=posting.name, address=posting.address, key=posting.key, store=posting.store, job_hash=job_hash, host=host
    )
    return work(job, assignment)


class _Overheard(io.TextIOBase):
    """Passes on what is written, and remembers the last line."""

    def __init__(self, out: Any) -> None:
        self.last = ""
        self._out = out

    def write(self, text: str) -> int:
        self.last = next((line for line in reversed(text.splitlines()) if line.strip()), self.last)
        self._out.write(text)  # Ray's streams do not say how much
        return len(text)

    def flush(self) -> None:
        self._out.flush()
