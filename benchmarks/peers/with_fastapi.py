"""FastAPI and uvicorn as one would write it for speed: a micro-batcher before the model, which has a thread.

python -m benchmarks.peers.with_fastapi MODEL WEIGHTS PORT SETTINGS

SETTINGS is JSON: ``workers`` (processes, each with the model), ``most_waiting`` (requests of a process; more are
refused with 503). An idle model takes what comes at once; what comes while it computes goes together.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from benchmarks.served_models import MOST_AT_ONCE, Loaded


class Full(Exception):
    """Too many wait."""


class MicroBatcher:
    """Batches in turn, of what waits by then."""

    def __init__(self, loaded: Loaded, most_waiting: int) -> None:
        self._loaded = loaded
        self._most_waiting = most_waiting
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[dict[str, Any], asyncio.Future[Any]]] = deque()
        self._work: asyncio.Task[None] | None = None

    async def ask(self, row: dict[str, Any]) -> Any:
        if len(self._waiting) >= self._most_waiting:
            raise Full
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((row, answer))
        if self._work is None:
            self._work = asyncio.create_task(self._go_on())
        return await answer

    async def _go_on(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(MOST_AT_ONCE, len(self._waiting)))]
            found = await loop.run_in_executor(self._thread, self._loaded.answer, [row for row, _ in batch])
            for (_, answer), value in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(value)
        self._work = None


def make_app() -> FastAPI:
    model, weights, text = json.loads(os.environ["WITH_FASTAPI"])
    batcher = MicroBatcher(Loaded(model, weights), json.loads(text)["most_waiting"])
    gc.freeze()  # to look through torch for garbage takes 0.1 s, in which nobody is answered
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        try:
            answer = await batcher.ask(orjson.loads(await request.body()))
        except Full:
            return Response(status_code=503)
        return Response(orjson.dumps(answer), media_type="application/json")

    return app


def main(model: str, weights: str, port: str, text: str) -> None:
    os.environ["WITH_FASTAPI"] = json.dumps([model, weights, text])
    uvicorn.run(
        "benchmarks.peers.with_fastapi:make_app", factory=True, port=int(port), workers=json.loads(text)["workers"],
        log_level="warning", access_log=False, loop="uvloop", http="httptools", backlog=2048,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
