"""A gRPC server in a thread, and calls to it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import torch

from shoal.serving.inference import Face
from shoal.serving.messages import message
from shoal.serving.rpc import GrpcServer
from shoal.serving.server import Tls

SERVICE = "inference.GRPCInferenceService"
PATIENCE_S = 20.0
ROW = torch.tensor([[1, 2, 3], [4.5, 0, -1]])
TIMES = torch.tensor([1, 10])


@contextlib.contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loop")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def answering(face: Face, tls: Tls | None = None) -> Iterator[str]:
    """Serve a face over gRPC while the context lasts, at the address that is given."""
    with loop_in_a_thread() as loop:
        server = GrpcServer(face, tls=tls)
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(PATIENCE_S)
        try:
            yield f"127.0.0.1:{server.port}"
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(1.0), loop).result(PATIENCE_S)


def call(channel: grpc.Channel, name: str, request: Any = None, **options: Any) -> Any:
    ask = channel.unary_unary(
        f"/{SERVICE}/{name}",
        request_serializer=lambda one: one if isinstance(one, bytes) else one.SerializeToString(),
        response_deserializer=message(f"{name}Response").FromString,
    )
    request = message(f"{name}Request")() if request is None else request
    return ask(request, **{"timeout": PATIENCE_S, **options})


def question(**changes: Any) -> Any:
    """Of two samples, as typed contents."""
    request = message("ModelInferRequest")(model_name="scaled", **changes)
    row = request.inputs.add(name="row", datatype="FP32", shape=[2, 3])
    row.contents.fp32_contents.extend(ROW.flatten().tolist())
    times = request.inputs.add(name="times", datatype="INT64", shape=[2])
    times.contents.int64_contents.extend(TIMES.tolist())
    return request


def raw_question(**changes: Any) -> Any:
    """The same, as raw bytes."""
    request = question(**changes)
    for tensor, value in zip(request.inputs, (ROW, TIMES), strict=True):
        tensor.ClearField("contents")
        request.raw_input_contents.append(value.numpy().tobytes())
    return request


def wait_for(happened: Callable[[], bool]) -> None:
    """Until it does."""
    waiting = threading.Event()
    for _ in range(int(PATIENCE_S * 100)):
        if happened():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not happen")
