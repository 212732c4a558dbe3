"""Flask under gunicorn with threads, a sample at a time.

python -m benchmarks.peers.with_flask MODEL WEIGHTS PORT SETTINGS

SETTINGS is JSON: ``workers`` (processes, each with the model), ``threads`` of each, and ``backlog``: the connections
that wait, after which the kernel refuses.
"""

from __future__ import annotations

import json
import os
import sys

from flask import Flask, Response, jsonify, request
from gunicorn.app.wsgiapp import run

from benchmarks.served_models import Loaded


def make_app() -> Flask:
    loaded = Loaded(*json.loads(os.environ["WITH_FLASK"]))
    app = Flask(__name__)

    @app.post("/predict")
    def predict() -> Response:
        return jsonify(loaded.answer([request.get_json()])[0])

    return app


def main(model: str, weights: str, port: str, text: str) -> None:
    wanted = json.loads(text)
    os.environ["WITH_FLASK"] = json.dumps([model, weights])
    sys.argv = [
        "gunicorn", "benchmarks.peers.with_flask:make_app()", "--bind", f"127.0.0.1:{port}",
        "--worker-class", "gthread", "--workers", str(wanted["workers"]), "--threads", str(wanted["threads"]),
        "--backlog", str(wanted["backlog"]), "--keep-alive", "75", "--log-level", "warning",
    ]  # fmt: skip
    run()


if __name__ == "__main__":
    main(*sys.argv[1:])
