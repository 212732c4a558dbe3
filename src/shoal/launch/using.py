"""What a run has made, put to use: its model, its figures, its predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shoal.errors import ConfigError, ShoalError
from shoal.evaluation import measure, merged
from shoal.job import Job, load_job, override, parse_settings
from shoal.lanes import deal
from shoal.launch.run import Run, find_run
from shoal.training.folder import RunFolder
from shoal.versions import Snapshot, Store, Versions

if TYPE_CHECKING:
    from shoal.serving import Predictor


def job_of(run: Run | RunFolder | str | Path, job: Job | None = None, settings: Sequence[str] = ()) -> Job:
    """The job that a run was started with; ``job`` itself if the run was started from Python."""
    record = _folder(run).read_record()
    if job is None:
        if record["job_file"] is None:
            raise ConfigError(f"{record['name']} was started from Python, without a job file; give the job itself")
        job = load_job(Path(record["job_file"]))
    return override(job, parse_settings([*record["settings"], *settings]))


def _folder(run: Run | RunFolder | str | Path) -> RunFolder:
    if isinstance(run, RunFolder):
        return run
    return RunFolder(run.path) if isinstance(run, Run) else find_run(run)


def read_version(run: Run | RunFolder | str | Path, version: int | None = None) -> Snapshot:
    """A stored version of a run, checked; the newest unless ``version`` names a step."""
    return Versions(Store(_folder(run).read_record()["store"])).read(version)


def load_model(run: Run | str | Path, version: int | None = None, job: Job | None = None) -> nn.Module:
    """The run's model as of a stored version, in evaluation mode, on the CPU."""
    model = job_of(run, job).task.model()
    return _filled(model, read_version(run, version))


def _filled(model: nn.Module, snapshot: Snapshot) -> nn.Module:
    missing, unexpected = model.load_state_dict(snapshot.model, strict=False)
    tied = {name for name in missing if name in _tied(model)}
    if set(missing) - tied or unexpected:
        names = ", ".join(sorted({*missing, *unexpected} - tied)[:3])
        raise ConfigError(f"version {snapshot.step} does not fit the job's model: {names}; has the job's code changed?")
    return model.eval()


def _tied(model: nn.Module) -> set[str]:
    """Names of tensors that share their memory with one that has an earlier name: stored once, under that."""
    first: dict[int, str] = {}
    return {n for n, t in model.state_dict().items() if first.setdefault(t.data_ptr(), n) != n}


def evaluate(
    run: Run | str | Path,
    *,
    version: int | None = None,
    workers: int = 1,
    settings: Sequence[str] = (),
    job: Job | None = None,
) -> dict[str, Any]:
    """The metrics of a stored version on the job's test data: the same at any number of worker processes."""
    job = job_of(run, job, settings)
    if job.test is None:
        raise ConfigError("the job has no test data; give it one with test=…")
    torch.set_num_threads(1)
    model = _filled(job.task.model(), read_version(run, version))
    lanes = deal(job.num_lanes, {str(rank): 1.0 for rank in range(workers)})
    if workers == 1:
        return merged([_measure(job, model, lanes["0"])])
    return merged(_in_forks([lambda own=own: _measure(job, model, own) for own in lanes.values()]))  # type: ignore[misc]


def _measure(job: Job, model: nn.Module, lanes: Sequence[int]) -> bytes:
    assert job.test is not None
    reader = job.test.open()
    try:
        return measure(job, model, reader, lanes)
    finally:
        reader.close()


def _in_forks(parts: Sequence[Any]) -> list[bytes]:
    """Each part's bytes, computed in a process of its own."""
    pipes = [_fork(part) for part in parts]
    payloads, failed = [], False
    for pid, fd in pipes:
        with os.fdopen(fd, "rb") as pipe:
            payloads.append(pipe.read())
        failed = os.waitpid(pid, 0)[1] != 0 or failed
    if failed:
        raise ShoalError("a process that measured its lanes has failed; its output above says why")
    return payloads


def _fork(part: Any) -> tuple[int, int]:
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return pid, ours
    code = 1
    try:
        with os.fdopen(theirs, "wb") as pipe:
            pipe.write(part())
        code = 0
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def predictor(run: Run | str | Path, version: int | None = None, job: Job | None = None) -> Predictor:
    """What serving needs of a run: its model as of a version, with names for what goes in and out."""
    from shoal.serving import predictor_of

    resolved = job_of(run, job)
    snapshot = read_version(run, version)
    return predictor_of(resolved.task, _filled(resolved.task.model(), snapshot), snapshot.step)
