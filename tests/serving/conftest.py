"""A predictor, and a server for it on a free port."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import torch

from shoal.serving import ModelPredictor, Server, make_predictor
from tests.serving.scaled import Scaled


@pytest.fixture(scope="package")
def predictor() -> ModelPredictor:
    weights = {"0.weight": torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, 0.0]]), "0.bias": torch.zeros(2)}
    return make_predictor(Scaled(), weights, name="scaled", version=7)


@pytest.fixture(scope="package")
def server(predictor: ModelPredictor) -> Iterator[Server]:
    with Server(predictor) as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client
