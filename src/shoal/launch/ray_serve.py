"""A package or a run as a Ray Serve application: the same addresses, on a Ray cluster that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import ConfigError
from shoal.launch.opening import Sources
from shoal.launch.ray import imported_ray
from shoal.launch.service import Target, stock_of
from shoal.service.wire import Source
from shoal.serving import Batching, asgi_app
from shoal.serving.predictor import warm_up


def application(target: Target, num_replicas: int = 1, batching: Batching | None = None) -> Any:
    """What ``ray.serve.run`` and ``serve deploy`` take: replicas that each hold the model and answer as ``shoal serve``
    does, over HTTP. Ray sees to their number and replaces those that end; which version they have stays as it is.

    Every node must find the target, and what its job's file loads, at the same path. ``ConfigError`` if it cannot be
    served, or without ``shoal[ray]``.
    """
    imported_ray("Ray Serve")
    from ray import serve

    _, stock = stock_of(target)
    chosen = target.version if target.version is not None else stock.newest()
    if chosen is None:
        raise ConfigError(f"{target.path} has no version yet")
    source = stock.source(chosen)
    name = f"shoal-{Path(source.path).name}"
    deployment: Any = serve.deployment(name=name, num_replicas=num_replicas)
    return deployment(serve.ingress()(Model)).bind(msgspec.msgpack.encode(source), batching or Batching())


class Model:
    """One replica's."""

    def __init__(self, source: bytes, batching: Batching) -> None:
        opened = Sources().open(msgspec.msgpack.decode(source, type=Source))
        warm_up(opened.predictor, opened.probe.inputs, batching.max_samples, batching.max_batch_s)
        self._predictor, self._batching = opened.predictor, batching

    def __serve_build_asgi_app__(self) -> Any:
        return asgi_app(self._predictor, batching=self._batching)
