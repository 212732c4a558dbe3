"""From a run to a model package, and from a package to what answers with it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shoal.errors import ConfigError, Fault
from shoal.events import read_events
from shoal.job import Batch, Job, hash_job
from shoal.launch.run import Run
from shoal.launch.using import evaluate, first_samples, folder_of, job_of, predictor, read_version
from shoal.serving.package import MANIFEST, Description, Package, TaskRecord, read, write
from shoal.serving.packaged import differences, probe_of, with_code
from shoal.serving.predictor import two_zeros
from shoal.serving.whole import refuse_present
from shoal.shards import has_tables
from shoal.training.folder import RunFolder
from shoal.versions.tensor_file import bytes_of

if TYPE_CHECKING:
    from shoal.serving import ModelPredictor

_NUM_PROBED = 32

Form = Literal["package", "onnx", "torch", "mlflow"]
ENDINGS: dict[Form, str] = {"package": "", "onnx": ".onnx", "torch": ".pt2", "mlflow": ".mlflow"}
"""What a model can be exported as, and how the name of such a file or folder ends."""


def is_package(path: Path) -> bool:
    """Whether a folder is one, or was to be."""
    return (path / MANIFEST).exists()


def export(
    run: Run | RunFolder | str | Path, to: Path | None = None, *, version: int | None = None, job: Job | None = None,
    form: Form = "package", sign_with: Path | None = None,
) -> Path:  # fmt: skip
    """Write a stored version of a run, by default the newest, as a model package or in a form for other servers: where
    it is.

    ``to``: the folder or file to make, by default NAME-VERSION in this one, with the form's ending. ``form``: of
    ``ENDINGS``. What is no package has been asked the same samples as the model when this returns. ``sign_with``: the
    file of a private key, for a package. A package's metrics are those of the run's evaluation at that step, or, if
    there was none and the job has test data, of one now. ``ConfigError`` for what is there already, a run that was
    started from Python, or a model that the form cannot hold.
    """
    if sign_with is not None and form != "package":
        raise ConfigError(f"a signature is a package's, and {form} was asked for; export a package with it as well")
    folder = folder_of(run)
    record = folder.read_record()
    if record["job_file"] is None:
        raise ConfigError(f"{record['name']} was started from Python, and a package names the file of its job")
    resolved = job_of(folder, job)
    served = predictor(folder, version, resolved)
    target = to or Path(f"{served.name}-{served.version}{ENDINGS[form]}")
    refuse_present(target)
    if form in ("package", "mlflow"):
        package = _package(folder, served, resolved)
        if form == "package":
            write(package, target, sign_with=sign_with)
        else:
            from shoal.serving.mlflow_model import write_mlflow

            write_mlflow(package, Path(record["job_file"]), target)
    else:
        from shoal.serving import graph

        samples = probe_of(served, first_samples(resolved, _NUM_PROBED)).inputs
        write_graph = graph.write_onnx if form == "onnx" else graph.write_torch
        write_graph(served, samples or two_zeros(served.inputs), target)
    return target


def _package(folder: RunFolder, served: ModelPredictor, job: Job) -> Package:
    record, snapshot = folder.read_record(), read_version(folder, served.version)
    samples = first_samples(job, _NUM_PROBED)
    metas, arrays = _tables(served, folder, snapshot.step)
    description = Description(
        name=served.name, version=served.version, created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs=list(served.inputs), outputs=list(served.outputs), task=_task(record, job),
        metrics=_metrics(folder, snapshot.step, job), tables=metas,
        lineage={
            "run": record["name"], "step": snapshot.step, "revision": record["identity"]["job_hash"],
            **_kept(snapshot.meta),
            "data": _data(job, samples), "libraries": _libraries(record),
        },
    )  # fmt: skip
    return Package(description=description, tensors=snapshot.model, probe=probe_of(served, samples), tables=arrays)


def open_package(path: Path, job_file: Path | None, signed_by: Path | None = None) -> ModelPredictor:
    """What answers with a package's model and a job file's task; nothing of the package itself is run, nor anything
    that it names. ``signed_by``: as of ``package.read``."""
    package = read(path, signed_by)
    if job_file is None:
        told = package.description.task
        raise ConfigError(f"{path} holds no code: give the file {told.job_file} of its task {told.name} with --job")
    return with_code(package, job_file)[1]


def verified(path: Path, job_file: Path | None = None, signed_by: Path | None = None) -> dict[str, Any]:
    """What a package is, once all of it has been checked; with its code also that it answers as it did, with a public
    key that its owner has signed it. ``Fault`` if it does not, or is not."""
    package = read(path, signed_by)
    told = package.description
    figures: dict[str, Any] = {"name": told.name, "version": told.version, "sha256": package.digest}
    figures |= {"task": f"{told.task.name} in {told.task.job_file}, revision {told.task.revision}"}
    if signed_by is not None:
        figures["signed_by"] = str(signed_by)
    if job_file is not None:
        found = differences(with_code(package, job_file)[1], package.probe)
        if wrong := {name: value for name, value in found.items() if value}:
            raise Fault(f"{path} answers otherwise than when it was exported: {wrong} at most; it is skewed")
        figures["probed"] = len(next(iter(package.probe.inputs.values()), ()))
    return figures


def _task(record: Mapping[str, Any], job: Job) -> TaskRecord:
    path = Path(record["job_file"])
    return TaskRecord(
        name=type(job.task).__name__, job_file=path.name, revision=hash_job(path), settings=record["settings"]
    )  # fmt: skip


def _kept(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Of a version's meta what says which samples are in it, and which model it is."""
    return {key: meta[key] for key in ("fingerprint", "seed", "ledger", "lagging") if key in meta}


def _metrics(folder: RunFolder, step: int, job: Job) -> dict[str, Any]:
    figures: dict[str, Any] | None = None
    for event in read_events(folder.events_path)[0]:
        if event["kind"] == "evaluated" and event["step"] == step:
            figures = event["figures"]
    if figures is not None or job.test is None:
        return figures or {}
    return evaluate(folder, version=step, job=job)


def _data(job: Job, samples: Batch) -> dict[str, Any]:
    """What a model was trained on, as far as that can be told without reading all of it: a hash of the sizes of its
    blocks and of some samples."""
    sizes = job.train.block_sizes()
    digest = hashlib.sha256(np.asarray(sizes, np.int64).tobytes())
    columns = samples.items() if isinstance(samples, Mapping) else enumerate(samples)
    for name, tensor in columns:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(bytes_of(tensor))
    return {"source": type(job.train).__name__, "samples": sum(sizes), "fingerprint": digest.hexdigest()}


def _libraries(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        "python": platform.python_version(), "shoal": record["identity"]["shoal"],
        "torch": record["identity"]["torch"], "numpy": version_of("numpy"),
    }  # fmt: skip


def _tables(served: ModelPredictor, folder: RunFolder, step: int) -> tuple[list[dict[str, Any]], list[Any]]:
    if not has_tables(served.model):
        return [], []
    from shoal.serving.tables import stored, whole
    from shoal.shards.embedding import embeddings_of, specs_of
    from shoal.shards.reading import stored_tables

    source = stored_tables(folder.path, step)
    images = [whole(source.tables(spec.name)) for spec in specs_of(embeddings_of(served.model))]
    return [image.meta() for image in images], [stored(image) for image in images]
