"""Starting, stopping and asking a server."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading

import httpx
import numpy as np
import pytest
import torch

from shoal.errors import ConfigError, Fault, LinkFault
from shoal.serving import ModelPredictor, Server, predict, serve
from shoal.serving.datatypes import (
    ARRAY_DTYPES,
    DTYPES,
    as_arrays,
    as_tensors,
    from_bytes,
    from_json,
    to_bytes,
    to_json,
)

TIMES = torch.tensor([1, 10])
OURS = ("shoal.serving.app", "shoal.serving.http1")
ROW = torch.tensor([[1, 2, 3], [4.5, 0, -1]])


def test_a_client_gets_tensors_for_tensors(server: Server) -> None:
    outputs = predict(server.model_url, {"row": ROW, "times": TIMES})
    assert torch.equal(outputs["scores"], torch.tensor([[14.0, 0.5], [15.0, 22.5]]))
    assert torch.equal(outputs["best"], torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "row", [ROW.numpy(), ROW.tolist(), [[1, 2, 3], [4.5, 0, -1]]], ids=["array", "floats", "mixed"]
)
def test_a_client_takes_arrays_and_lists_too(server: Server, row: object) -> None:
    outputs = predict(server.model_url + "/versions/7/", {"row": row, "times": [1, 10]})
    assert outputs["best"].tolist() == [0, 1]


def test_a_refusal_reaches_the_caller_with_the_servers_reason(server: Server) -> None:
    with pytest.raises(ConfigError, match=r"answered 400: input 'row': datatype must be FP32, not FP64"):
        predict(server.model_url, {"row": ROW.double(), "times": TIMES})
    with pytest.raises(ConfigError, match="answered 404: no model 'scales'"):
        predict(f"{server.url}/v2/models/scales", {"row": ROW, "times": TIMES})
    with pytest.raises(ConfigError, match="no input 'rows': it has row, times"):
        predict(server.model_url, {"rows": [[1, 2, 3]], "times": TIMES})
    with pytest.raises(ConfigError, match="evenly nested lists"):
        predict(server.model_url, {"row": [[1, 2, 3], [1]], "times": TIMES})


def test_numbers_that_json_cannot_say_are_not_sent(server: Server) -> None:
    with pytest.raises(ConfigError, match="'row' in JSON: finite numbers were needed"):
        predict(server.model_url, {"row": ROW / 0, "times": TIMES})


def test_a_failing_model_is_a_fault(predictor: ModelPredictor) -> None:
    class Failing:
        name, version, inputs, outputs = "failing", 1, predictor.inputs, predictor.outputs

        def predict(self, inputs: object) -> dict[str, torch.Tensor]:
            raise ZeroDivisionError("by zero")

    with Server(Failing()) as server, pytest.raises(Fault, match=r"answered 500: .*ZeroDivisionError: by zero"):
        predict(server.model_url, {"row": ROW, "times": TIMES})


def test_no_server_is_a_link_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(LinkFault, match="is a server running there"):
        predict(f"http://127.0.0.1:{port}/v2/models/m", {"x": ROW})


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v2/models/m", "ftp://x/v2/models/m", "http://host:port", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"looks like http://127\.0\.0\.1:8000/v2/models/NAME"):
        predict(url, {"x": ROW})


def test_what_answers_something_else_is_no_model(server: Server) -> None:
    with pytest.raises(ConfigError, match="metadata in JSON was needed"):
        predict(f"{server.url}/v2/health/live", {"x": [1]})


def test_a_port_in_use_is_refused_before_anything_starts(server: Server, predictor: ModelPredictor) -> None:
    port = int(server.url.rpartition(":")[2])
    for start in (serve, Server):
        with pytest.raises(ConfigError, match=rf"cannot serve on 127.0.0.1:{port}: .*choose another host or port"):
            start(predictor, "127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("127.0.0.1", 70_000)])
def test_an_address_that_cannot_be_had_is_refused(predictor: ModelPredictor, host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="cannot serve on"):
        Server(predictor, host, port)


def test_a_server_may_listen_on_ipv6(predictor: ModelPredictor) -> None:
    try:
        server = Server(predictor, "::1")
    except ConfigError:
        pytest.skip("this machine has no IPv6 loopback")
    with server:
        assert server.url.startswith("http://[::1]:")
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200


def test_a_server_leaves_neither_thread_nor_port(predictor: ModelPredictor) -> None:
    before = set(threading.enumerate())
    with Server(predictor) as server:
        predict(server.model_url, {"row": ROW, "times": TIMES})
    assert set(threading.enumerate()) == before
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_answers_do_not_wait_for_delayed_acknowledgements(server: Server) -> None:
    assert server._listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


SERVES = """
import sys
from functools import partial
sys.path.insert(0, sys.argv[1])
from shoal.serving import make_predictor, serve
from tests.serving.scaled import Scaled
serve(
    make_predictor(Scaled(), Scaled().model().state_dict(), name="a b", version=1),
    port=0,
    announce=partial(print, flush=True),
)
"""


def test_serve_announces_its_address_and_ends_by_sigterm(request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-c", SERVES, str(request.config.rootpath)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.endswith("/v2/models/a%20b")
            assert predict(url, {"row": ROW, "times": TIMES})["best"].shape == (2,)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == -signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.parametrize("missing", ["starlette", "httptools", "httpx"])
def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, predictor: ModelPredictor, missing: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing or name in OURS]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(missing), *sys.meta_path])
    with pytest.raises(ConfigError, match=rf"needs the package {missing}: pip install 'shoal\[serve\]'"):
        predict("http://127.0.0.1:1/v2/models/m", {"x": ROW}) if missing == "httpx" else Server(predictor)


class Without:
    """An importer that has not got one package."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.name)


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_datatype_comes_back_from_json_and_bytes(datatype: str) -> None:
    tensor = torch.from_numpy(np.arange(6) % 2).to(DTYPES[datatype]).reshape(2, 3)
    if tensor.is_floating_point():
        tensor = tensor * 0.3
    values = as_arrays({"x": tensor})["x"]
    as_json = str(to_json(values)).lower().encode()
    for found in (from_json(as_json, datatype, [2, 3]), from_bytes(memoryview(to_bytes(values)), datatype, [2, 3])):
        assert found.dtype == values.dtype == ARRAY_DTYPES[datatype] and np.array_equal(found, values)
        assert torch.equal(as_tensors({"x": found})["x"], tensor)
