"""Ray Serve with @serve.batch, on a cluster of its own on this machine.

python -m benchmarks.peers.with_ray_serve MODEL WEIGHTS PORT SETTINGS

SETTINGS is JSON: ``workers`` (replicas), ``batch_wait_s``, ``max_ongoing`` requests of a replica, ``most_waiting``
beyond them: more are refused with 503 (-1: any number).
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.served_models import MOST_AT_ONCE, Loaded


class Model:
    """A request is a sample."""

    def __init__(self, model: str, weights: str, batch_wait_s: float) -> None:
        self._loaded = Loaded(model, weights)
        self._answer.set_batch_wait_timeout_s(batch_wait_s)

    @serve.batch(max_batch_size=MOST_AT_ONCE, batch_wait_timeout_s=0.001)
    async def _answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return self._loaded.answer(rows)

    async def __call__(self, request: Request) -> dict[str, Any]:
        return await self._answer(await request.json())


def main(model: str, weights: str, port: str, text: str) -> None:
    wanted = json.loads(text)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            serve.start(
                http_options={"host": "127.0.0.1", "port": int(port)}, logging_config={"enable_access_log": False}
            )
            deployment = serve.deployment(
                Model, num_replicas=wanted["workers"], max_ongoing_requests=wanted["max_ongoing"],
                max_queued_requests=wanted["most_waiting"], ray_actor_options={"num_cpus": 1},
            )  # fmt: skip
            serve.run(deployment.bind(model, weights, wanted["batch_wait_s"]), route_prefix="/predict")
            ended.wait()
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
