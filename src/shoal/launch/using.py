"""What a run has made, put to use: its model, its figures, its predictions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shoal.errors import ConfigError, ShoalError
from shoal.evaluation import measure, merged
from shoal.job import Batch, Job, Predicts, TensorSpec, load_job, override, parse_settings
from shoal.lanes import Ledger, Order, deal
from shoal.launch.run import Run, find_run
from shoal.shards import has_tables
from shoal.training.folder import RunFolder
from shoal.training.kit import plan_steps
from shoal.training.round import feeds
from shoal.versions import Snapshot, Store, Versions, with_ties

if TYPE_CHECKING:
    from shoal.serving import ModelPredictor, Predictor


def job_of(run: Run | RunFolder | str | Path, job: Job | None = None, settings: Sequence[str] = ()) -> Job:
    """The job that a run was started with; ``job`` itself if the run was started from Python."""
    record = folder_of(run).read_record()
    if job is None:
        if record["job_file"] is None:
            raise ConfigError(f"{record['name']} was started from Python, without a job file; give the job itself")
        job = load_job(Path(record["job_file"]))
    return override(job, parse_settings([*record["settings"], *settings]))


def folder_of(run: Run | RunFolder | str | Path) -> RunFolder:
    """A run's folder."""
    if isinstance(run, RunFolder):
        return run
    return RunFolder(run.path) if isinstance(run, Run) else find_run(run)


def read_version(run: Run | RunFolder | str | Path, version: int | None = None) -> Snapshot:
    """A stored version of a run, checked; the newest unless ``version`` names a step."""
    return Versions(Store(folder_of(run).read_record()["store"])).read(version)


def load_model(run: Run | str | Path, version: int | None = None, job: Job | None = None) -> nn.Module:
    """The run's model as of a stored version, in evaluation mode, on the CPU."""
    model = job_of(run, job).task.model()
    return _filled(model, read_version(run, version), folder_of(run))


def _filled(model: nn.Module, snapshot: Snapshot, folder: RunFolder) -> nn.Module:
    try:
        model.load_state_dict(with_ties(model, snapshot.model))
    except RuntimeError as error:
        raise ConfigError(
            f"version {snapshot.step} does not fit the job's model; has its code changed? {error}"
        ) from error
    return _with_tables(model, folder, snapshot.step).eval()


def _with_tables(model: nn.Module, folder: RunFolder, step: int) -> nn.Module:
    """A model whose embeddings, if it has any, read the run's tables of a version."""
    if has_tables(model):
        from shoal.shards.reading import attach

        attach(model, folder.path, step)
    return model


@dataclass(frozen=True)
class Account:
    """How many samples a version's steps should have taken, and took. ``repeated`` and ``lost`` are 0 if they are the
    very same samples; a sample lost for one repeated shows as one of each."""

    due: int
    taken: int
    lost: int
    repeated: int


def account(run: Run | str | Path, version: int | None = None, job: Job | None = None) -> Account:
    """Compare what a version's workers say that they contributed, step by step, with what was due."""
    snapshot = read_version(run, version)
    steps = plan_steps(job_of(run, job))
    due = Ledger()
    lagging = {int(lane): step for lane, step in snapshot.meta.get("lagging", {}).items()}
    for step, lanes in feeds(range(steps.num_lanes), snapshot.step, lagging).items():
        due = sum((Ledger.expected(span, lanes) for span in steps.spans(0, step)), due)
    taken = Ledger(*snapshot.meta["ledger"])
    exchanged = int(due.count == taken.count and due.checksum != taken.checksum)
    lost, repeated = max(0, due.count - taken.count), max(0, taken.count - due.count)
    return Account(due.count, taken.count, lost + exchanged, repeated + exchanged)


def evaluate(
    run: Run | RunFolder | str | Path,
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
    model = _filled(job.task.model(), read_version(run, version), folder_of(run))
    lanes = deal(job.num_lanes, {str(rank): 1.0 for rank in range(workers)})
    if workers == 1:
        return measured(job, model)
    return merged(_in_forks([lambda own=own: _measure(job, model, own) for own in lanes.values()]))


def measured(job: Job, model: nn.Module) -> dict[str, Any]:
    """A model's metrics on the job's test data, all of it in this process."""
    return merged([_measure(job, model, range(job.num_lanes))])


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
        torch.set_num_threads(1)
        with os.fdopen(theirs, "wb") as pipe:
            pipe.write(part())
        code = 0
    except Exception as error:  # noqa: BLE001 - told by the exit code
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def predictor(run: Run | RunFolder | str | Path, version: int | None = None, job: Job | None = None) -> ModelPredictor:
    """What serving needs of a run: its model as of a version, and names for what goes in and out."""
    resolved = job_of(run, job)
    snapshot = read_version(run, version)
    served = untabled(folder_of(run), snapshot, resolved)
    _with_tables(served.model, folder_of(run), snapshot.step)
    return served


def untabled(folder: RunFolder, snapshot: Snapshot, job: Job) -> ModelPredictor:
    """What serves a version, but that its embeddings, if it has any, read no table yet."""
    from shoal.serving import make_predictor

    record = folder.read_record()
    name = Path(record["job_file"]).stem if record["job_file"] else type(job.task).__name__.lower()
    tensors = with_ties(job.task.model(), snapshot.model)
    example = None if isinstance(job.task, Predicts) else first_samples(job, 2)
    return make_predictor(job.task, tensors, name=name, version=snapshot.step, example=example)


def first_samples(job: Job, num: int) -> Batch:
    """The first of an epoch's training samples, at most ``num``."""
    reader, sizes = job.train.open(), job.train.block_sizes()
    try:
        return reader.gather(Order(sizes, 1, seed=0, epoch=0).slice(0, 0, min(num, sum(sizes))))
    finally:
        reader.close()


def predict(run: Run | str | Path, inputs: Mapping[str, Any], version: int | None = None) -> dict[str, Tensor]:
    """Predict in this process. ``inputs``: tensors, or what ``torch.as_tensor`` takes, by name."""
    return answered(predictor(run, version), inputs)


def answered(served: Predictor, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """All outputs. ``ConfigError`` for inputs that are not the model's."""
    tensors = {}
    for spec in served.inputs:
        if spec.name not in inputs:
            raise ConfigError(
                f"input {spec.name} is needed ({spec.datatype} {list(spec.shape)}); came: {', '.join(inputs)}"
            )
        tensors[spec.name] = _as_spec(spec, inputs[spec.name])
    return dict(served.predict(tensors))


def _as_spec(spec: TensorSpec, value: Any) -> Tensor:
    from shoal.serving.datatypes import DTYPES

    try:
        tensor = torch.as_tensor(value, dtype=DTYPES[spec.datatype])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"input {spec.name} must be {spec.datatype} of shape {list(spec.shape)}: {error}") from error
    fits = tensor.ndim == len(spec.shape) and all(w in (-1, s) for w, s in zip(spec.shape, tensor.shape, strict=True))
    if not fits:
        raise ConfigError(f"input {spec.name} must be of shape {list(spec.shape)}, not {list(tensor.shape)}")
    return tensor
