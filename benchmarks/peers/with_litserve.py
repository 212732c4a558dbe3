"""LitServe with its dynamic batches.

python -m benchmarks.peers.with_litserve MODEL WEIGHTS PORT SETTINGS

SETTINGS is JSON: ``workers`` (processes with the model), ``batch_wait_s`` (0: no batches), ``fast_queue`` (its queue
over ZeroMQ), ``timeout_s`` after which a request that waits is refused.
"""

import json
import sys
from typing import Any

import litserve

from benchmarks.served_models import MOST_AT_ONCE, Loaded


class Model(litserve.LitAPI):
    """A request is a sample."""

    def __init__(self, model: str, weights: str, **options: Any) -> None:
        super().__init__(api_path="/predict", **options)
        self._from = model, weights

    def setup(self, device: str) -> None:
        self._loaded = Loaded(*self._from)

    def decode_request(self, request: dict) -> dict[str, Any]:
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(inputs)

    def predict(self, x: Any) -> Any:
        return self._loaded.answer(x) if isinstance(x, list) else self._loaded.answer([x])[0]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def main(model: str, weights: str, port: str, text: str) -> None:
    wanted = json.loads(text)
    options = (
        {"max_batch_size": MOST_AT_ONCE, "batch_timeout": wanted["batch_wait_s"]} if wanted["batch_wait_s"] else {}
    )
    server = litserve.LitServer(
        Model(model, weights, **options), accelerator="cpu", workers_per_device=wanted["workers"],
        timeout=wanted["timeout_s"], fast_queue=wanted["fast_queue"], disable_openapi_url=True,
    )  # fmt: skip
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
