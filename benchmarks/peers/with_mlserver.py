"""MLServer with a runtime of our own, for the Open Inference Protocol.

python -m benchmarks.peers.with_mlserver MODEL WEIGHTS PORT SETTINGS

SETTINGS is JSON: ``workers`` (0: the model is in the server's process), ``batch_wait_s`` (0: no adaptive batches).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch
from mlserver import MLModel
from mlserver.cli import main as mlserver
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.served_models import MOST_AT_ONCE, Loaded


class Runtime(MLModel):
    """A model of ``served_models``."""

    async def load(self) -> bool:
        self._loaded = Loaded(self.settings.name, self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        inputs = {each.name: torch.from_numpy(NumpyCodec.decode_input(each)) for each in payload.inputs}
        outputs = [
            NumpyCodec.encode_output(name, output.numpy()) for name, output in self._loaded.predict(inputs).items()
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def free_ports(num: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main(model: str, weights: str, port: str, text: str) -> None:
    wanted = json.loads(text)
    grpc_port, metrics_port = free_ports(2)
    settings = {
        "host": "127.0.0.1", "http_port": int(port), "grpc_port": grpc_port, "metrics_port": metrics_port,
        "debug": False, "parallel_workers": wanted["workers"], "use_structured_logging": False,
    }  # fmt: skip
    described = {
        "name": model, "implementation": "benchmarks.peers.with_mlserver.Runtime", "parameters": {"uri": weights},
    }  # fmt: skip
    if wanted["batch_wait_s"]:
        described |= {"max_batch_size": MOST_AT_ONCE, "max_batch_time": wanted["batch_wait_s"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MLSERVER_ENVIRONMENTS_DIR"] = name
        settings["metrics_dir"] = name
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model-settings.json").write_text(json.dumps(described))
        sys.argv = ["mlserver", "start", name]
        mlserver()


if __name__ == "__main__":
    main(*sys.argv[1:])
