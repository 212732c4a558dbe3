"""BentoML with its adaptive batches; its batches have one array, so a request is rows of numbers.

python -m benchmarks.peers.with_bentoml MODEL WEIGHTS PORT SETTINGS

SETTINGS is JSON: ``workers`` (processes, each with the model), ``max_latency_ms`` for which it sizes its batches and
beyond which it refuses, ``max_concurrency`` (null: any), ``batchable``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import bentoml
import numpy as np

from benchmarks.served_models import MOST_AT_ONCE, Loaded

MODEL, WEIGHTS, TEXT = json.loads(os.environ.get("WITH_BENTOML", '["clothes", "", "{}"]'))
WANTED: dict[str, Any] = json.loads(TEXT)
TRAFFIC = {"timeout": 60} | ({"max_concurrency": WANTED["max_concurrency"]} if WANTED.get("max_concurrency") else {})


@bentoml.service(workers=WANTED.get("workers", 1), traffic=TRAFFIC)
class Model:
    """Rows of numbers to rows of numbers."""

    def __init__(self) -> None:
        self._loaded = Loaded(MODEL, WEIGHTS)

    @bentoml.api(
        batchable=WANTED.get("batchable", True), max_batch_size=MOST_AT_ONCE,
        max_latency_ms=WANTED.get("max_latency_ms", 50),
    )  # fmt: skip
    def predict(self, rows: np.ndarray) -> np.ndarray:
        outputs = self._loaded.predict(self._loaded.split(rows))
        return np.concatenate([output.numpy().reshape(len(rows), -1) for output in outputs.values()], 1)


def main(model: str, weights: str, port: str, text: str) -> None:
    os.environ |= {"WITH_BENTOML": json.dumps([model, weights, text]), "BENTOML_DO_NOT_TRACK": "True"}
    words = ["serve", "benchmarks.peers.with_bentoml:Model", "--host", "127.0.0.1", "--port", port]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *words])


if __name__ == "__main__":
    main(*sys.argv[1:])
