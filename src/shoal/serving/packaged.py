"""A package's model, with the task that it is of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.job import Job, hash_job, load_job, override, parse_settings
from shoal.job.task import Predicts, Task, TensorSpec
from shoal.serving.package import Package, Probe
from shoal.serving.predictor import ModelPredictor, Predictor, make_predictor
from shoal.shards import has_tables
from shoal.versions import with_ties

_CLOSE, _NEAR_ZERO = 1e-4, 1e-5
"""Of answers in floating point: what another processor may make differ."""


def with_code(package: Package, job_file: Path) -> tuple[Job, ModelPredictor]:
    """A job file's job, and what answers with a package's model and its task. ``ConfigError`` as of
    ``packaged_predictor``."""
    job = override(load_job(job_file), parse_settings(package.description.task.settings))
    return job, packaged_predictor(package, job.task, hash_job(job_file))


def packaged_predictor(package: Package, task: Task, revision: str) -> ModelPredictor:
    """What answers with a package's model. ``revision``: of the task's code (``hash_job``). ``ConfigError`` if that is
    not the code that the package describes, or if the model takes or gives something else."""
    told = package.description
    if revision != told.task.revision:
        raise ConfigError(
            f"{told.name}, version {told.version}, is of the task {told.task.name} in {told.task.job_file}, revision "
            f"{told.task.revision}, and the code at hand is of revision {revision}; bring the code that it was "
            "exported with, or export it again"
        )
    tensors = with_ties(task.model(), package.tensors)
    example = None if isinstance(task, Predicts) else (_zeros(told.inputs[0]),)
    served = make_predictor(task, tensors, name=told.name, version=told.version, example=example)
    if has_tables(served.model):
        from shoal.serving.tables import attach

        attach(served.model, told.tables, package.tables)
    for kind, here, there in (("takes", served.inputs, told.inputs), ("gives", served.outputs, told.outputs)):
        if _by_name(here) != _by_name(there):
            raise ConfigError(f"{told.name}: the task {kind} {list(here)}, and the package says {there}")
    return served


def differences(predictor: Predictor, probe: Probe) -> dict[str, float]:
    """Of each output for the probe's samples, how far it is at most from what it was: 0 where it is as close as two
    processors are. The skew test's figure."""
    if not probe.inputs:
        return {}
    return differences_of(predictor.predict(probe.inputs), probe.outputs)


def differences_of(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """As ``differences``, of answers."""
    return {name: _difference(found[name], one) if name in found else math.inf for name, one in expected.items()}


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    ours, theirs = found.double(), expected.double()
    if torch.allclose(ours, theirs, rtol=_CLOSE, atol=_NEAR_ZERO, equal_nan=True):
        return 0.0
    return float((ours - theirs).abs().nan_to_num(float("inf")).max())


def probe_of(predictor: Predictor, batch: Any) -> Probe:
    """Training samples as requests would carry them: by the names of a batch's columns, or the first tensor if there is
    one input. Empty where that does not fit."""
    specs = predictor.inputs
    columns: Mapping[str, Tensor] = batch if isinstance(batch, Mapping) else {}
    if not columns and len(specs) == 1:
        columns = {specs[0].name: batch[0]}
    if not all(spec.name in columns and _fits(columns[spec.name], spec) for spec in specs):
        return Probe()
    inputs = {spec.name: columns[spec.name].contiguous() for spec in specs}
    return Probe(inputs, {name: out.contiguous() for name, out in predictor.predict(inputs).items()})


def _fits(tensor: Tensor, spec: TensorSpec) -> bool:
    from shoal.serving.datatypes import DTYPES

    is_as_wide = tensor.ndim == len(spec.shape) and all(
        size in (-1, came) for size, came in zip(spec.shape, tensor.shape, strict=True)
    )
    return is_as_wide and tensor.dtype == DTYPES[spec.datatype]


def _zeros(spec: TensorSpec) -> Tensor:
    from shoal.serving.datatypes import DTYPES

    return torch.zeros([2, *(max(1, size) for size in spec.shape[1:])], dtype=DTYPES[spec.datatype])


def _by_name(specs: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}
