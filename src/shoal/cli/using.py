"""Verbs that use what a run has made: eval, serve, predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from shoal.errors import ConfigError
from shoal.launch import run as runs

at_version = click.option("--version", type=int, help="The version of this step.  [default: the newest]")
as_json = click.option("--json", "json_", is_flag=True, help="Print one JSON value.")


@click.command("eval")
@click.argument("run", default="latest")
@at_version
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes to share the lanes."
)
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Replace any field of the job.")
@as_json
def evaluate(run: str, version: int | None, workers: int, settings: tuple[str, ...], json_: bool) -> None:
    """Measure a stored version on the job's test data."""
    from shoal.launch import using

    figures = using.evaluate(_path(run), version=version, workers=workers, settings=settings)
    if json_:
        click.echo(json.dumps(figures))
        return
    for name, value in figures.items():
        click.echo(f"{name:20} {value:.6f}" if isinstance(value, float) else f"{name:20} {value}")


@click.command()
@click.argument("run", default="latest")
@at_version
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
def serve(run: str, version: int | None, host: str, port: int) -> None:
    """Answer predictions over HTTP by the Open Inference Protocol v2."""
    from shoal.launch import using
    from shoal.serving import serve as serve_predictor

    serve_predictor(using.predictor(_path(run), version), host, port, announce=_say_where)


def _say_where(url: str) -> None:
    click.echo(f"serving at {url}", err=True)


@click.command()
@click.argument("target", metavar="RUN|URL")
@click.argument("inputs", type=click.File("r"))
@at_version
def predict(target: str, inputs: Any, version: int | None) -> None:
    """Send inputs to a server (an http:// URL), or predict in place from a run.

    INPUTS is a JSON file, or - for standard input: {"image": [[…]]}, the first axis counting samples.
    """
    try:
        tensors = json.load(inputs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{inputs.name} is not JSON: {error}") from None
    if not isinstance(tensors, dict):
        raise ConfigError(
            f'{inputs.name} must hold an object such as {{"image": [[…]]}}, not a {type(tensors).__name__}'
        )
    click.echo(json.dumps(_predicted(target, tensors, version)))


def _predicted(target: str, tensors: dict[str, Any], version: int | None) -> dict[str, Any]:
    if target.startswith(("http://", "https://")):
        from shoal.serving import predict as ask

        outputs = ask(target, tensors)
    else:
        from shoal.launch import using

        outputs = using.predict(_path(target), tensors, version)
    return {name: tensor.tolist() for name, tensor in outputs.items()}


def _path(run: str) -> Path:
    return runs.find_run(run).path


ALL = (evaluate, serve, predict)
