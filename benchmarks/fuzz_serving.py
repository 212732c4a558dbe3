"""Bodies that were broken on purpose, against a server in a process of its own: what it answers, and its memory.

python -m benchmarks.fuzz_serving [--quick] [--bodies 10000] [--seed 1]

Each body is a good one, of plain JSON, of the Open Inference Protocol as JSON, with tensors as bytes, or as a gRPC
message, to which one to three things were done: cut short, bytes changed, pieces repeated, numbers out of all bounds,
values of other kinds, nesting without end, lengths that are not true. The server must refuse or answer each with
something below 500 and answer on. Memory is what the kernel says is resident of the server's process, after each
tenth: all that grows once has grown after the first. Exits with 1 if an answer was missing or was a server error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import torch
from torch import Tensor

from benchmarks.machine import finish
from shoal.job.task import TensorSpec
from shoal.serving.answering import Alone
from shoal.serving.app import App
from shoal.serving.codec import LENGTH_HEADER
from shoal.serving.http1 import HttpServer
from shoal.serving.inference import Face
from shoal.serving.messages import message
from shoal.serving.rpc import GrpcServer
from shoal.serving.server import listen

GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"
INFER = "/v2/models/fuzzed/infer"
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, "", "row", "FP32", "\0", "ä" * 1000,
    [], [[]], [[[1]]], {}, {"name": "row"}, [1, "2"], [None], ["INT64"], "x" * 100_000,
)  # fmt: skip
JUNK_LENGTHS = ("0", "-1", "7", "1e9", "99999999999999999999", "", "1 2", "0x10", "٣")
TIMEOUT_S = 30


@dataclass(frozen=True)
class Body:
    """What is sent, and to whom."""

    address: str
    content: bytes
    length: str | None = None
    """For the header that says how many bytes are JSON."""


class Model:
    """Sums of rows, times whole numbers: for any shapes that fit."""

    name, version = "fuzzed", 1
    inputs = (TensorSpec("row", "FP32", (-1, 3)), TensorSpec("times", "INT64", (-1,)))
    outputs = (TensorSpec("sum", "FP32", (-1,)),)

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # Whatever finite numbers came, the answer can be told in JSON.
        return {"sum": torch.nan_to_num(inputs["row"].sum(1) * inputs["times"])}


def bodies(seed: int) -> Iterator[Body]:
    """Broken ones, without end; the same for a seed."""
    dice = random.Random(seed)
    makers = (_plain, _protocol, _binary, _message)
    while True:
        body = dice.choice(makers)(dice)
        for _ in range(dice.choice((0, 1, 1, 2))):
            body = Body(body.address, dice.choice(BREAKS)(dice, body.content), body.length)
        yield body


def _plain(dice: random.Random) -> Body:
    columns: Any = {"row": [[1.5, -2, 3]] * 2, "times": [1, 2]}
    return Body("/predict", _text(dice, columns))


def _protocol(dice: random.Random) -> Body:
    request: Any = {"id": "a1", "inputs": [_row(data=[1.5, -2, 3]), _times()], "outputs": [{"name": "sum"}]}
    return Body(INFER, _text(dice, request), dice.choice((None, None, None, *JUNK_LENGTHS)))


def _binary(dice: random.Random) -> Body:
    request: Any = {"inputs": [_row(parameters={"binary_data_size": 12}), _times()]}
    request["parameters"] = {"binary_data_output": dice.random() < 0.5}
    head = _text(dice, request)
    length = str(len(head)) if dice.random() < 0.8 else dice.choice(JUNK_LENGTHS)
    return Body(INFER, head + struct.pack("<3f", 1.5, -2, dice.choice((3, float("nan")))), length)


def _message(dice: random.Random) -> Body:
    request = message("ModelInferRequest")(model_name="fuzzed")
    row = request.inputs.add(name="row", datatype="FP32", shape=[1, dice.choice((3, 3, 3, 2**62, -1))])
    times = request.inputs.add(name="times", datatype="INT64", shape=[1])
    if dice.random() < 0.5:
        row.contents.fp32_contents.extend([1.5, -2, 3])
        times.contents.int64_contents.append(1)
    else:
        request.raw_input_contents.extend([struct.pack("<3f", 1.5, -2, 3), struct.pack("<q", 1)])
    return Body(GRPC_METHOD, request.SerializeToString())


def _row(**data: Any) -> dict[str, Any]:
    return {"name": "row", "datatype": "FP32", "shape": [1, 3], **data}


def _times() -> dict[str, Any]:
    return {"name": "times", "datatype": "INT64", "shape": [1], "data": [1]}


def _text(dice: random.Random, value: Any) -> bytes:
    """As JSON; in half of all cases with a value somewhere in it replaced."""
    if dice.random() < 0.5:
        value = json.loads(json.dumps(value))
        _spoil(dice, value)
    return json.dumps(value).encode()


def _spoil(dice: random.Random, value: Any) -> None:
    places = list(value) if isinstance(value, dict) else range(len(value))
    place = dice.choice(places)
    inner = value[place]
    if isinstance(inner, dict | list) and inner and dice.random() < 0.8:
        _spoil(dice, inner)
    elif isinstance(value, dict) and dice.random() < 0.2:
        value[dice.choice(("", "name", "x" * 1000))] = value.pop(place)
    else:
        value[place] = dice.choice(JUNK)


def _cut(dice: random.Random, content: bytes) -> bytes:
    return content[: dice.randrange(len(content) + 1)]


def _changed(dice: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 2, 8)) if changed else 0):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def _repeated(dice: random.Random, content: bytes) -> bytes:
    begin = dice.randrange(len(content) + 1)
    end = min(len(content), begin + dice.choice((1, 10, 100)))
    return content[:end] + content[begin:end] * dice.choice((1, 2, 1000)) + content[end:]


def _nested(dice: random.Random, content: bytes) -> bytes:
    at, depth = dice.randrange(len(content) + 1), dice.choice((3, 500, 5_000, 200_000))
    opened, closed = dice.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"[[1],", b"]"), (b"\x0a\x7f", b"")))
    return content[:at] + opened * depth + content[at:] + closed * depth * dice.randrange(2)


def _lengthened(dice: random.Random, content: bytes) -> bytes:
    """Bytes that a reader of messages takes for a length, or digits that make a number larger."""
    at = dice.randrange(len(content) + 1)
    return content[:at] + dice.choice((b"\xff\xff\xff\xff\x7f", b"\xff" * 9 + b"\1", b"9" * 30)) + content[at:]


def _noise(dice: random.Random, content: bytes) -> bytes:
    return content[: dice.choice((0, 0, 9))] + dice.randbytes(dice.choice((0, 1, 100, 10_000)))


BREAKS: tuple[Callable[[random.Random, bytes], bytes], ...] = (_cut, _changed, _repeated, _nested, _lengthened, _noise)


class Asker:
    """Of a server, over HTTP and gRPC."""

    def __init__(self, http_port: int, grpc_port: int) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=TIMEOUT_S)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        self._call = self._channel.unary_unary(GRPC_METHOD)

    def ask(self, body: Body) -> str:
        """The answer's status; ``lost`` if there was none."""
        if body.address == GRPC_METHOD:
            try:
                self._call(body.content, timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                name: str = error.code().name
                return name
            return "OK"
        headers = {} if body.length is None else {LENGTH_HEADER: body.length.encode()}
        try:
            return str(self._http.post(body.address, content=body.content, headers=headers).status_code)
        except httpx.HTTPError as error:
            print(f"no answer: {error!r} to {body.content[:80]!r}", file=sys.stderr)
            return "lost"

    def close(self) -> None:
        self._http.close()
        self._channel.close()


def is_failure(status: str) -> bool:
    """Whether a status is the server's failure, or none."""
    return status.startswith("5") or status in {"lost", "INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED"}


async def serve() -> None:
    """HTTP and gRPC from one event loop, until it is ended."""
    face = Face(service=Alone(Model()))
    rpc = GrpcServer(face)
    await rpc.start()
    with listen("127.0.0.1", 0) as listener:
        print(listener.getsockname()[1], rpc.port, flush=True)
        await HttpServer(App(face)).serve(listener)
    await rpc.stop(1.0)


def resident_mb(pid: int) -> float:
    """Of a process, in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1000


def measure(num_bodies: int, seed: int) -> dict[str, Any]:
    """Ask a new server."""
    command = [sys.executable, "-m", "benchmarks.fuzz_serving", "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            asker = Asker(*map(int, process.stdout.readline().split()))
            figures = _asked(asker, process.pid, num_bodies, seed)
            asker.close()
            return {**figures, "is_alive": process.poll() is None}
        finally:
            process.terminate()


def _asked(asker: Asker, pid: int, num_bodies: int, seed: int) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    source, begun_s = bodies(seed), time.monotonic()
    tenths_mb = []
    for number in range(1, num_bodies + 1):
        statuses[asker.ask(next(source))] += 1
        if number % (num_bodies // 10) == 0:
            tenths_mb.append(resident_mb(pid))
    return {
        "num_bodies": num_bodies,
        "num_failures": sum(count for status, count in statuses.items() if is_failure(status)),
        "statuses": dict(sorted(statuses.items())),
        "resident_mb": tenths_mb,
        "growth_mb": round(tenths_mb[-1] - tenths_mb[0], 1),
        "took_s": round(time.monotonic() - begun_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer bodies")
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve())
        return
    num_bodies = 1_000 if options.quick else options.bodies
    figures = measure(num_bodies, options.seed)
    finish("fuzz_serving", figures, {"quick": options.quick, "num_bodies": num_bodies}, options.seed)
    if figures["num_failures"] or not figures["is_alive"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
