"""A package or a run as a Ray Serve application: the same addresses, on a Ray cluster that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.errors import ConfigError
from shoal.launch.opening import Sources
from shoal.launch.ray import imported_ray
from shoal.launch.service import stock_of
from shoal.service.wire import Source
from shoal.serving import Batching, asgi_app


def application(
    target: str | Path, *, version: int | None = None, job_file: Path | None = None, num_replicas: int = 1,
    batching: Batching | None = None,
) -> Any:  # fmt: skip
    """What ``ray.serve.run`` and ``serve deploy`` take: replicas that each hold the model and answer as ``shoal serve``
    does, over HTTP. Ray sees to their number and replaces those that end; which version they have stays as it is.

    ``target``: a run, or a package with its task's ``job_file``; every node must find it, and what the job's file
    loads, at the same path. ``ConfigError`` if it cannot be served, or without ``shoal[ray]``.
    """
    imported_ray("Ray Serve")
    from ray import serve

    _, stock = stock_of(target, version, job_file)
    chosen = version if version is not None else stock.newest()
    if chosen is None:
        raise ConfigError(f"{target} has no version yet")
    source = stock.source(chosen)
    name = f"shoal-{Path(source.path).name}"
    deployment: Any = serve.deployment(name=name, num_replicas=num_replicas)
    return deployment(serve.ingress()(Model)).bind(source.path, source.version, source.job_file, batching or Batching())


class Model:
    """One replica's."""

    def __init__(self, path: str, version: int | None, job_file: str | None, batching: Batching) -> None:
        self._predictor = Sources().open(Source(path, version, job_file)).predictor
        self._batching = batching

    def __serve_build_asgi_app__(self) -> Any:
        return asgi_app(self._predictor, batching=self._batching)
