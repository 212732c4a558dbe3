"""What every face of a server asks, be it HTTP or gRPC: a service, which knows models and answers for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec

from shoal.errors import ConfigError, Fault
from shoal.job.task import TensorSpec
from shoal.serving.batching import Batcher, Batching, Threaded
from shoal.serving.datatypes import Arrays
from shoal.serving.predictor import Predictor


class Unknown(ConfigError):
    """No such model, or no such version of it, is served here."""


class NotReady(Fault):
    """No version is served yet, or none any more."""


@dataclass(frozen=True)
class Served:
    """What is told of a model: as ``Predictor``."""

    name: str
    version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, predictor: Predictor) -> Served:
        return cls(predictor.name, predictor.version, tuple(predictor.inputs), tuple(predictor.outputs))


class Answer(msgspec.Struct, frozen=True):
    """All outputs by name, and the version that they are of."""

    version: int
    outputs: Arrays


class Service(Protocol):
    """Called within one event loop."""

    def is_ready(self) -> bool:
        """Whether a request would be answered."""
        ...

    def versions(self) -> Sequence[Served]:
        """All that answer. The first is the one that is asked unless a request names another."""
        ...

    def check_room(self, num_bytes: int = 0) -> None:
        """``Overloaded`` if a request of so many bytes would be refused. Cheap: for before one is read."""
        ...

    def ask(self, inputs: Arrays, timeout_s: float, version: int | None = None) -> asyncio.Future[Answer]:
        """Answer inputs that fit the specs. ``version``: this one, or it fails with ``Unknown``. It fails with
        ``Overloaded`` or ``Expired`` as ``Batcher.ask`` does; with anything else for the model's own failure."""
        ...


def find(service: Service, name: str | None = None, version: str | None = None) -> Served:
    """The model of this name, and in this version if one is named. ``Unknown`` if it is not served, ``NotReady`` if
    none is."""
    models = service.versions()
    if not models:
        raise NotReady("no model is served yet: ask again later")
    if name not in (None, models[0].name):
        raise Unknown(f"no model {name!r} is served here, only {models[0].name!r}")
    if version is None:
        return models[0]
    for model in models:
        if str(model.version) == version:
            return model
    raise Unknown(f"model {name!r} is served in version {', '.join(str(m.version) for m in models)}, not {version}")


def failed(error: Exception) -> asyncio.Future[Any]:
    """That has failed already."""
    future = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


class Alone:
    """One model in this process, in a thread of its own."""

    def __init__(self, predictor: Predictor, batching: Batching | None = None) -> None:
        self._served = Served.of(predictor)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="predict")
        self._batcher = Batcher(batching)
        self._batcher.add(Threaded(predictor.predict, self._thread))

    def is_ready(self) -> bool:
        return True

    def versions(self) -> Sequence[Served]:
        return (self._served,)

    def check_room(self, num_bytes: int = 0) -> None:
        self._batcher.check_room(num_bytes)

    def ask(self, inputs: Arrays, timeout_s: float, version: int | None = None) -> asyncio.Future[Answer]:
        if version not in (None, self._served.version):
            return failed(Unknown(f"version {self._served.version} is served, not {version}"))
        return self._batcher.ask_for(inputs, timeout_s, partial(Answer, self._served.version))

    def close(self) -> None:
        self._batcher.close()
        self._thread.shutdown(cancel_futures=True)
