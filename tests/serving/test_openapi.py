"""The HTTP interface describes itself, with examples that are answered."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest
import torch
from torch import nn

from shoal.job import TensorSpec
from shoal.serving import ModelPredictor, Server, make_predictor
from shoal.serving.access import Key
from shoal.serving.answering import Alone, Served
from shoal.serving.app import App
from shoal.serving.datatypes import DTYPES
from shoal.serving.inference import Face
from shoal.serving.openapi import document

SECRET = "a-key-of-24-characters-ab"


@pytest.fixture(name="told")
def _told(http: httpx.Client) -> Any:
    return http.get("/openapi.json").json()


def test_it_is_an_openapi_document(told: Any) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(told)
    assert told["info"]["title"] == "scaled" and told["info"]["version"] == "7"


@pytest.mark.parametrize(("path", "schema"), [("/predict", "Predict"), ("/v2/models/scaled/infer", "Infer")])
def test_its_examples_are_answered_as_it_says(told: Any, http: httpx.Client, path: str, schema: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    (example,) = told["components"]["schemas"][f"{schema}Request"]["examples"]
    answer = http.post(path, json=example)
    assert answer.status_code == 200
    for value, kind in ((example, "Request"), (answer.json(), "Response")):
        jsonschema.validate(value, {**told, "$ref": f"#/components/schemas/{schema}{kind}"})


def test_every_address_is_there(told: Any, http: httpx.Client) -> None:
    for path, operations in told["paths"].items():
        if "get" in operations:
            assert http.get(path).status_code == 200, path
        else:
            assert http.post(path).status_code == 400, path


def test_every_refusal_is_told(told: Any) -> None:
    statuses = {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}
    assert set(told["paths"]["/predict"]["post"]["responses"]) == statuses


class Free:
    """Sums of rows of any length, of every datatype."""

    def model(self) -> nn.Module:
        return nn.Identity()

    def inputs(self) -> list[TensorSpec]:
        return [TensorSpec(name, name, (-1, -1)) for name in DTYPES]

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        return {"sum": sum(value.float().sum(1) for value in inputs.values())}

    loss = metrics = model


def test_every_datatype_and_axes_of_any_size_have_examples_that_are_answered() -> None:
    with Server(make_predictor(Free(), {}, name="a/b c", version=1)) as server:  # type: ignore[arg-type]
        schemas = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
        example = schemas["PredictRequest"]["examples"][0]
        assert httpx.post(f"{server.url}/predict", json=example).json() == {"sum": [0.0]}
    assert torch.tensor(example["FP32"]).shape == (1, 32)


def test_a_key_is_asked_for(predictor: ModelPredictor) -> None:
    told = document(Served.of(predictor), "/models", has_key=True)
    assert told["security"] == [{"bearer": []}, {"key": []}] and told["servers"] == [{"url": "/models"}]
    assert told["paths"]["/v2/health/ready"]["get"]["security"] == []


async def asked(app: App, path: str, *headers: tuple[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        return await client.get(path, headers=dict(headers))


def test_the_document_takes_a_key_and_the_page_says_nothing_without_one(predictor: ModelPredictor) -> None:
    app = App(Face(service=Alone(predictor), key=Key(SECRET)))
    assert asyncio.run(asked(app, "/openapi.json")).status_code == 401
    told = asyncio.run(asked(app, "/openapi.json", ("X-API-Key", SECRET))).json()
    assert set(told["components"]["securitySchemes"]) == {"bearer", "key"}
    page = asyncio.run(asked(app, "/docs"))
    assert page.status_code == 200 and "scaled" not in page.text


def test_the_page_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!openapi\.json)", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_every_field_of_the_page_has_a_label(http: httpx.Client) -> None:
    text = http.get("/docs").text
    for kind, field in re.findall(r"<(input|textarea) id=\"(\w+)\"", text):
        assert f'<label for="{field}">' in text, kind
