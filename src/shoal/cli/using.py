"""Verbs that use what a run has made: eval, export, verify, predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shoal.errors import ConfigError
from shoal.launch import run as runs

if TYPE_CHECKING:
    from shoal.serving import Predictor

at_version = click.option("--version", type=int, help="The version of this step.  [default: the newest]")
_A_PATH = click.Path(path_type=Path)
at_job = click.option(
    "--job", "job_file", type=_A_PATH, help="The job file of a package's task, whose code packages do not hold."
)
at_signer = click.option(
    "--signed-by", type=_A_PATH, help="The file of the public key whose owner must have signed the package."
)
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
@click.option("--to", type=_A_PATH, help="The folder or file to make.  [default: NAME-VERSION in this one]")
@click.option(
    "--as", "form", type=click.Choice(["package", "onnx", "torch", "mlflow"]), default="package", show_default=True
)
@click.option("--sign", "key", type=_A_PATH, help="The file of a private key to sign the package with.")
def export(run: str, version: int | None, to: Path | None, form: Any, key: Path | None) -> None:
    """Write a version of a run as a model package: a folder of data, under checksums, that every server reads. Or, for
    other servers, as ONNX, as a torch.export program or as an MLflow model, which are tried before they are kept."""
    from shoal.launch.exporting import export as export_run

    click.echo(export_run(_path(run), to, version=version, form=form, sign_with=key))


@click.command()
@click.argument("package", type=_A_PATH)
@at_job
@at_signer
@as_json
def verify(package: Path, job_file: Path | None, signed_by: Path | None, json_: bool) -> None:
    """Check a package's files against its manifest, with --signed-by its signature, and with --job its answers against
    those that it was exported with. Without --job no code is run."""
    from shoal.launch.exporting import verified

    told = verified(package, job_file, signed_by)
    if json_:
        click.echo(json.dumps(told))
        return
    for name, value in told.items():
        click.echo(f"{name:12} {value}")


def _predictor(target: str, version: int | None, job_file: Path | None, signed_by: Path | None) -> Predictor:
    from shoal.launch import using
    from shoal.launch.exporting import is_package, open_package

    if is_package(Path(target)):
        if version is not None:
            raise ConfigError(f"{target} is a package, of one version: leave --version out")
        return open_package(Path(target), job_file, signed_by)
    if signed_by is not None:
        raise ConfigError(f"--signed-by is for packages, and {target} is none")
    if job_file is not None:
        raise ConfigError(f"--job is for packages, and {target} is none: a run knows its job")
    return using.predictor(_path(target), version)


@click.command()
@click.argument("target", metavar="RUN|PACKAGE|URL")
@click.argument("inputs", type=click.File("r"))
@at_version
@at_job
@at_signer
def predict(target: str, inputs: Any, version: int | None, job_file: Path | None, signed_by: Path | None) -> None:
    """Send inputs to a server (an http:// URL), or predict in place from a run or a package.

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
    click.echo(json.dumps(_predicted(target, tensors, version, job_file, signed_by)))


def _predicted(
    target: str, tensors: dict[str, Any], version: int | None, job_file: Path | None, signed_by: Path | None
) -> dict[str, Any]:
    if target.startswith(("http://", "https://")):
        from shoal.serving import predict as ask

        if any(given is not None for given in (version, job_file, signed_by)):
            raise ConfigError(
                f"the server at {target} has its own version and code: leave --version, --job and --signed-by out"
            )
        outputs = ask(target, tensors)
    else:
        from shoal.launch import using

        outputs = using.answered(_predictor(target, version, job_file, signed_by), tensors)
    return {name: tensor.tolist() for name, tensor in outputs.items()}


def _path(run: str) -> Path:
    return runs.find_run(run).path


ALL = (evaluate, export, verify, predict)
