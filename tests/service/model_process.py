"""A model's process whose models need no run: version N adds N to each number, and some do what they should not.

``python -m tests.service.model_process SOCKET LIFELINE``
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.job import TensorSpec
from shoal.launch import replica
from shoal.service.child import Opened
from shoal.service.wire import Source
from shoal.serving.package import Probe

DEADLY, NEGATIVE, WRONG = -666.0, -1.0, -2.0
"""Numbers that end the process, that a model fails on, and that are the asker's mistake."""
SLOW_S = 0.05
MOST_AT_ONCE = 8
TIRED_AFTER = 80
"""Batches, more than a gate replays."""


class Adds:
    """Answers with the version and the process, too."""

    name = "adds"
    inputs = (TensorSpec("number", "FP32", (-1,)),)

    def __init__(self, source: Source) -> None:
        self.kind = source.path
        self.version = source.version or 0
        self.num_computed = 0
        width = (-1, 2) if self.kind == "wider" else (-1,)
        self.outputs = (TensorSpec("sum", "FP32", width), TensorSpec("pid", "INT64", (-1,)))

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        number = inputs["number"]
        if bool((number == DEADLY).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        self.num_computed += 1
        if self.kind == "tires" and self.num_computed > TIRED_AFTER:
            raise ValueError("it is tired")
        if bool((number == WRONG).any()):
            raise ConfigError("there is no such number")
        if bool((number == NEGATIVE).any()) or (self.kind == "broken" and bool((number != 7).any())):
            raise ValueError("it cannot bear this")
        if self.kind == "crowded" and len(number) > MOST_AT_ONCE:
            raise MemoryError
        if self.kind == "slow":
            time.sleep(SLOW_S)
        return {"sum": number + self.version, "pid": number.long() * 0 + os.getpid()}


class Kinds:
    """By a source's path. ``good``; ``worse`` has a lower accuracy; ``endless`` is measured without end; ``crash`` and
    ``hang`` do so on loading; ``crowded`` bears few samples at once; ``skewed`` answers training samples otherwise than
    it did; ``broken`` fails on what is no training sample; ``tires`` fails after a while."""

    def prepare(self, source: Source) -> None:
        assert source.path

    def open(self, source: Source) -> Opened:
        model = Adds(source)
        match source.path:
            case "crash":
                os._exit(3)
            case "hang":
                time.sleep(1000)
            case "refused":
                raise ConfigError("it does not fit the task's model")
        inputs = {"number": torch.tensor([7.0, 7.0])}
        outputs = {"sum": model.predict(inputs)["sum"] + (1.0 if source.path == "skewed" else 0.0)}
        return Opened(predictor=model, probe=Probe(inputs, outputs), measure=lambda: _figures(source))


def _figures(source: Source) -> dict[str, Any]:
    while source.path == "endless":
        time.sleep(1000)
    if source.path == "unmeasured":
        raise ValueError("no data")
    if source.path == "misnamed":
        raise ConfigError("there is no such column")
    return {"accuracy": 0.5 if source.path == "worse" else 0.9 + 0.001 * (source.version or 0)}


if __name__ == "__main__":
    replica.main(Kinds())
