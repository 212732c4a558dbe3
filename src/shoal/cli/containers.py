"""The verb that readies a model for containers: docker."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from shoal.cli.using import at_job, at_version

_A_PATH = click.Path(path_type=Path)
_RUN = "docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges -p 127.0.0.1:8080:8080"


@click.command()
@click.argument("run", metavar="RUN|PACKAGE", default="latest")
@at_version
@at_job
@click.option("--to", type=_A_PATH, help="The folder to make.  [default: NAME-VERSION-image in this one]")
@click.option("--base", help="The image to start from, with Python.  [default: python:X.Y-slim-bookworm, X.Y as here]")
@click.option("--torch-index", help="Where torch comes from; '': the index of all else.  [default: PyTorch's for CPUs]")
@click.option("--wheel", type=_A_PATH, help="Shoal itself.  [default: made of a checkout, else from the index]")
def docker(
    run: str,
    version: int | None,
    job_file: Path | None,
    to: Path | None,
    base: str | None,
    torch_index: str | None,
    wheel: Path | None,
) -> None:
    """Write a folder that `docker build` makes an image of, which serves a run's version or a package."""
    from shoal.launch.image import ImageOptions, write_context

    given = {"base": base, "torch_index": torch_index, "wheel": wheel}
    options = ImageOptions(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    context = write_context(run, to, version=version, job_file=job_file, options=options, say=_say)
    click.echo(f"docker build -t {context.tag} {shlex.quote(str(context.folder))}")
    click.echo(f"{_RUN} {context.tag}")


def _say(text: str) -> None:
    click.echo(text, err=True)


ALL = (docker,)
