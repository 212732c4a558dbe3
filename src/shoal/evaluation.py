"""Evaluation over lanes: each worker measures its own, and the metrics merge exactly.

A batch never spans two lanes, so a model computes the same outputs and the figures are the same at any number of
workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from shoal.errors import ConfigError
from shoal.job import Batch, Job
from shoal.lanes import Order
from shoal.metrics import Metric, from_state
from shoal.sources import Reader, to_device

_ROWS = 256


def evaluate(
    job: Job,
    model: nn.Module,
    reader: Reader,
    lanes: Iterable[int],
    gather: Callable[[bytes], list[bytes]] = lambda payload: [payload],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The metrics of ``model`` on the job's test data, over all workers' lanes.

    ``gather`` brings every worker's payload to each; ``check`` is called once a batch and may raise to end it. The
    model's mode is as before afterwards.
    """
    return merged(gather(measure(job, model, reader, lanes, check)))


def measure(
    job: Job, model: nn.Module, reader: Reader, lanes: Iterable[int], check: Callable[[], None] = lambda: None
) -> bytes:
    """One worker's part: the metrics over these lanes of the test data, as a payload for ``merged``."""
    assert job.test is not None
    order = Order(job.test.block_sizes(), job.num_lanes, seed=0, epoch=0)
    own: dict[str, Metric] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches(order, reader, lanes, job.micro_batch or _ROWS):
                check()
                own = _add(own, job.task.metrics(model, to_device(batch, job.device)))
    finally:
        model.train(was_training)
    return msgspec.msgpack.encode({name: metric.to_state() for name, metric in own.items()})


def merged(payloads: Iterable[bytes]) -> dict[str, Any]:
    """Every worker's payload as one set of figures."""
    total: dict[str, Metric] = {}
    for payload in payloads:
        total = _add(total, {name: from_state(state) for name, state in msgspec.msgpack.decode(payload).items()})
    return {name: metric.value() for name, metric in total.items()}


def _batches(order: Order, reader: Reader, lanes: Iterable[int], rows: int) -> Iterable[Batch]:
    for lane in lanes:
        size = order.lane_size(lane)
        for start in range(0, size, rows):
            yield reader.gather(order.slice(lane, start, min(start + rows, size)))


def _add(one: dict[str, Metric], other: Mapping[str, Metric]) -> dict[str, Metric]:
    given: object = other
    if not isinstance(given, Mapping) or not all(isinstance(metric, Metric) for metric in given.values()):
        raise ConfigError('task.metrics must return metrics by name, such as {"accuracy": Accuracy.of(logits, labels)}')
    return {**one, **{name: one[name].merge(metric) if name in one else metric for name, metric in other.items()}}
