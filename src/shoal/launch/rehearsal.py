"""Before any worker starts: load the job, try its parts on two samples, and tell what it resolves to."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch

from shoal.codecs import warm_up
from shoal.errors import ConfigError, ShoalError
from shoal.job import Job, describe, files_of, hash_job, load_job, override, parse_settings
from shoal.lanes import Order
from shoal.shards import has_tables
from shoal.sources import Source, to_device
from shoal.strategies import Hybrid, ParameterServer
from shoal.training.computing import loss_of
from shoal.training.kit import plan_steps
from shoal.training.replica import Replica

_SAMPLES = 2


def tried(path: Path, settings: Sequence[str]) -> tuple[Job, dict[str, Any]]:
    """The file's job with the settings, and what a run's record holds of it."""
    job, job_hash = prepared(path, settings)
    return job, about(job, job_hash, settings) | {"files": [str(file) for file in files_of(path)]}


def prepared(path: Path, settings: Sequence[str]) -> tuple[Job, str]:
    """The file's job with the settings, and the digest of its code."""
    job = override(load_job(path), parse_settings(settings))
    compile_loops(job)
    return job, hash_job(path)


def compile_loops(job: Job) -> None:
    """So that no step waits for it; workers that are forked from here find them compiled."""
    if job.strategy.codec is not None:
        warm_up(job.strategy.codec)
    if isinstance(job.strategy, Hybrid | ParameterServer):
        from shoal.tables import batches

        batches.warm_up()


def about(job: Job, job_hash: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """What a run's record holds of a job that has been rehearsed; ``ConfigError`` says what does not fit."""
    return {
        "num_gpus": _in_a_fork(lambda: rehearse(job)),
        "job": describe(job, parse_settings(settings)),
        "settings": list(settings),
        "total_steps": plan_steps(job).total_steps,
        "identity": {"shoal": version("shoal"), "torch": str(torch.__version__), "job_hash": job_hash},
    }


def rehearse(job: Job) -> int:
    """Build the model and the optimizer, and compute loss and metrics of two samples: how many GPUs are here for that,
    0 if it wants none."""
    if job.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for and this machine has none; say device='cpu'")
    replica = _tried("task.model or the optimizer", lambda: Replica(job))
    _check_tables(job, replica)
    batch = _first_samples(job.train, "train")
    _tried(f"task.loss on {_SAMPLES} training samples", lambda: _loss(job, replica, batch))
    if job.test is not None:
        batch = to_device(_first_samples(job.test, "test"), job.device)
        replica.model.eval()
        with torch.no_grad():
            found = _tried(f"task.metrics on {_SAMPLES} test samples", lambda: job.task.metrics(replica.model, batch))
        _tried("task.metrics", lambda: [metric.merge(metric) for metric in found.values()])
    return torch.cuda.device_count() if job.device == "cuda" else 0


def _check_tables(job: Job, replica: Replica) -> None:
    uses_tables = has_tables(replica.model)
    if uses_tables:
        from shoal.shards.embedding import embeddings_of, specs_of

        specs_of(embeddings_of(replica.model))  # two of one name are refused
    if uses_tables and not isinstance(job.strategy, Hybrid | ParameterServer):
        kind = type(job.strategy).__name__
        raise ConfigError(f"the model has tables, and {kind} no shards for them; use Hybrid or ParameterServer")
    if isinstance(job.strategy, ParameterServer) and (job.schedule is not None or job.clip_norm is not None):
        raise ConfigError("with ParameterServer the shards update parameters: they know no schedule and no clip_norm")
    if not uses_tables and isinstance(job.strategy, Hybrid):
        raise ConfigError("strategy=Hybrid is for models with shoal.Embedding or EmbeddingBag, and this one has none")


def _loss(job: Job, replica: Replica, batch: Any) -> None:
    with torch.enable_grad():
        if not loss_of(job, replica.model, batch).requires_grad:
            raise ConfigError("task.loss must depend on the model's parameters; it has no gradient")


def _first_samples(source: Source, name: str) -> Any:
    sizes = source.block_sizes()
    if sum(sizes) == 0:
        raise ConfigError(f"the {name} source has no samples")
    reader = source.open()
    try:
        order = Order(sizes, 1, seed=0, epoch=0)
        return reader.gather(order.slice(0, 0, min(_SAMPLES, sum(sizes))))
    finally:
        reader.close()


def _tried(what: str, call: Any) -> Any:
    try:
        return call()
    except ShoalError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
        frame = frames[-1] if frames else frame
        place = f"{frame.filename}:{frame.lineno}"
        raise ConfigError(f"{what} failed at {place}: {type(error).__name__}: {error}") from error


def _in_a_fork(check: Callable[[], int]) -> int:
    """What ``check`` gives in a fork, so that this process stays fit to fork; raises what it raised."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer: dict[str, Any] = {"message": "", "exit_code": 0}
        try:
            answer["found"] = check()
        except ShoalError as error:
            answer = {"message": str(error), "exit_code": error.exit_code}
        except BaseException as error:  # noqa: BLE001 - the other process raises it
            answer = {"message": f"{type(error).__name__}: {error}", "exit_code": 1}
        os.write(theirs, msgspec.json.encode(answer))
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    if not data:
        raise ConfigError("the job ended the process that tried it on two samples; look at its output above")
    answer = msgspec.json.decode(data)
    if answer["exit_code"]:
        raise ConfigError(answer["message"]) if answer["exit_code"] == 2 else ShoalError(answer["message"])
    return int(answer["found"])
