"""What a model process does: load a model when it is told to, and compute what it is asked."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from shoal.errors import ConfigError, Fault
from shoal.service import wire
from shoal.serving.datatypes import Arrays, as_arrays
from shoal.serving.package import Probe
from shoal.serving.predictor import Predictor, computed, warm_up

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that is ready to answer. ``measure`` evaluates it; ``stored_s`` as ``wire.Loaded``."""

    predictor: Predictor
    probe: Probe = field(default_factory=Probe)
    measure: Callable[[], dict[str, Any]] = dict
    by_delta: bool = False
    stored_s: float | None = None


class Opener(Protocol):
    """Opens sources, one after another. ``ShoalError`` for one that cannot be."""

    def prepare(self, source: wire.Source) -> None:
        """Do what has to be done once for all versions from there."""
        ...

    def open(self, source: wire.Source) -> Opened:
        """The model of this one."""
        ...


class Child:
    """Serves one wire until its end. Whatever a model raises is told, and survived."""

    def __init__(self, end: wire.Wire, opener: Opener) -> None:
        self._wire = end
        self._opener = opener
        self._opened: Opened | None = None
        self._is_settled = False

    def serve(self) -> None:
        """Until the service goes."""
        self._wire.send(wire.pack(wire.Ready()))
        while (asked := self._wire.receive()) is not None:
            self._wire.send(self._answer(*asked))

    def _answer(self, message: wire.Message, arrays: Arrays) -> wire.Frame:
        try:
            match message:
                case wire.Compute():
                    begun_s = time.perf_counter()
                    outputs = computed(self._model.predictor.predict, arrays)
                    return wire.pack(wire.Computed(time.perf_counter() - begun_s), outputs)
                case wire.Load():
                    return self._load(message)
                case wire.Prepare(source):
                    self._opener.prepare(source)
                    return wire.pack(wire.Ready())
                case wire.Measure():
                    return wire.pack(wire.Measured(self._model.measure()))
                case _:
                    return wire.pack(wire.Failed(f"a model's process cannot answer {type(message).__name__}"))
        except ConfigError as error:
            return wire.pack(wire.Failed(error.message, is_config=True))
        except Fault as error:
            return wire.pack(wire.Failed(error.message))
        except Exception as error:  # noqa: BLE001 - told to the service, for whom it is
            if not isinstance(message, wire.Compute):
                _log.exception("a model's process failed")
            return wire.pack(wire.Failed(f"{type(error).__name__}: {error}"))

    @property
    def _model(self) -> Opened:
        if self._opened is None:
            raise ConfigError("no model is loaded")
        return self._opened

    def _load(self, message: wire.Load) -> wire.Frame:
        torch.set_num_threads(message.num_threads)
        self._opened = None  # what fails half way answers no more
        opened = self._opener.open(message.source)
        predictor, probe = opened.predictor, opened.probe
        if not opened.by_delta:
            warm_up(predictor, probe.inputs, message.max_samples, message.max_batch_s)
        self._opened = opened
        told = wire.Loaded(
            predictor.name, predictor.version, list(predictor.inputs), list(predictor.outputs), opened.by_delta,
            opened.stored_s,
        )  # fmt: skip
        if not self._is_settled:
            self._is_settled = True
            gc.freeze()  # to look through torch for garbage takes 0.1 s, in which nobody is answered
        tensors = {f"input/{name}": tensor for name, tensor in probe.inputs.items()}
        tensors |= {f"output/{name}": tensor for name, tensor in probe.outputs.items()}
        return wire.pack(told, as_arrays(tensors))
