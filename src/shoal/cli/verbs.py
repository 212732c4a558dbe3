"""Verbs that begin, watch and steer runs: train, status, runs, scale, stop, worker."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import click

from shoal.cli.serving import service_lines
from shoal.comm import messages as msg
from shoal.errors import ConfigError
from shoal.events import read_events
from shoal.launch import run as runs
from shoal.launch.progress import figures_text, shard_table, story, summary, table
from shoal.launch.services import services_of
from shoal.training.commanding import command

as_json = click.option("--json", "json_", is_flag=True, help="Print one JSON value.")


@click.command()
@click.argument("job", type=click.Path(path_type=Path), required=False)
@click.option("--workers", metavar="N|LOW..HIGH", help="How many, such as 4, or an elastic range.  [default: 1]")
@click.option(
    "--on",
    type=click.Choice(["local", "hosts", "ray", "manual"]),
    help="Who starts workers.  [default: hosts if SHOAL_HOSTS is set, else local]",
)
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Replace any field of the job.")
@click.option("--name", help="The run's name; its folder is made in $SHOAL_RUNS, else in ./runs.")
@click.option("--store", metavar="URL", help="Where versions go, such as s3://bucket/run.  [default: the run's folder]")
@click.option("--listen", metavar="HOST:PORT", help="Where the coordinator listens.  [default: loopback, a free port]")
@click.option("--resume", metavar="RUN", help="Go on with this run from its newest stored version.")
@click.option("--from-step", type=int, help="With --resume: from this version, when newer ones are damaged.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@as_json
def train(job: Path | None, resume: str | None, json_: bool, **given: Any) -> None:
    """Train the job of a Python file, or go on with a run."""
    options = runs.TrainOptions(store=given["store"], listen=given["listen"], quiet=given["quiet"])
    if resume is not None:
        kept = [f"--{name}" for name in ("name", "on", "store") if given[name] is not None]
        if job is not None or kept:
            raise click.UsageError(f"--resume takes this from the run: leave out {', '.join(kept) or 'the job file'}")
        ended = runs.resume(
            resume,
            workers=given["workers"],
            settings=given["settings"],
            from_step=given["from_step"],
            options=options,
        )
    elif given["from_step"] is not None:
        raise click.UsageError("--from-step goes with --resume")
    elif job is None:
        raise click.UsageError("a job file is needed, such as: shoal train job.py --workers 2")
    else:
        ended = runs.train(
            job,
            workers=given["workers"] or 1,
            on=given["on"] or ("hosts" if os.environ.get("SHOAL_HOSTS") else "local"),
            name=given["name"],
            settings=given["settings"],
            options=options,
        )
    if json_:
        click.echo(json.dumps({"run": ended.name, "outcome": ended.outcome, "figures": ended.figures}))
    else:
        click.echo(f"{ended.name} {ended.outcome}: {figures_text(ended.figures)}".rstrip(": "))


@click.command()
@click.argument("run", default="latest")
@click.option("--events", is_flag=True, help="What has happened, a line an event.")
@as_json
def status(run: str, events: bool, json_: bool) -> None:
    """How a run stands, and the services that serve it."""
    folder = runs.find_run(run)
    if events:
        for event in read_events(folder.events_path)[0]:
            if json_:
                click.echo(json.dumps(event))
            elif story(event):
                click.echo(f"{time.strftime('%H:%M:%S', time.localtime(event['at_s']))} {story(event)}")
        return
    if folder.is_under_way:
        now = command(folder, msg.Ask()).status
        told = {"run": folder.name, **now}
        lines = [f"{folder.name}  {summary(now)}", *table(now), *shard_table(now.get("shards", {}))]
    else:
        found = runs.finished_run(folder)
        told = _row(found)
        lines = [f"{found.name}  {found.outcome or 'cut off'}  {found.reason}  {figures_text(found.figures)}"]
    served = services_of(folder.name)
    if json_:
        click.echo(json.dumps({**told, "services": served}))
        return
    for line in [*lines, *(line for service in served for line in service_lines(service))]:
        click.echo(line)


@click.command("runs")
@as_json
def list_(json_: bool) -> None:
    """The runs that there are, newest first."""
    found = runs.list_runs()
    if json_:
        click.echo(json.dumps([_row(run) for run in found]))
        return
    for run in found:
        click.echo(f"{run.name:40} {_outcome(run):10} {figures_text(run.figures)}")


def _row(run: runs.Run) -> dict[str, Any]:
    return {
        "run": run.name,
        "outcome": _outcome(run),
        "reason": run.reason,
        "figures": run.figures,
        "path": str(run.path),
    }


def _outcome(run: runs.Run) -> str:
    return run.outcome or ("running" if runs.find_run(run.path).is_under_way else "cut off")


@click.command()
@click.argument("run")
@click.argument("workers", type=int, required=False)
@click.option("--shards", type=int, help="How many table shards. Buckets of rows move while they serve.")
def scale(run: str, workers: int | None, shards: int | None) -> None:
    """Go on with this many workers, from the next step on, or with this many table shards."""
    if workers is None and shards is None:
        raise ConfigError("say how many workers, or --shards and how many of them")
    if workers is not None and workers < 1:
        raise ConfigError(f"a run needs at least 1 worker, not {workers}; `shoal stop` ends it")
    command(runs.find_run(run), msg.Scale(target=workers, shards=shards))
    if workers is not None:
        click.echo(f"{run}: {workers} workers from the next step on")
    if shards is not None:
        click.echo(f"{run}: {shards} table shards, once their buckets have moved; `shoal status {run}` shows them")


@click.command()
@click.argument("run")
def stop(run: str) -> None:
    """Store the newest step and end the run."""
    folder = runs.find_run(run)
    command(folder, msg.Stop(reason="it was asked to stop"))
    while folder.is_under_way:
        time.sleep(0.05)
    click.echo(f"{folder.name} {runs.finished_run(folder).reason}")


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--join", "address", required=True, metavar="HOST:PORT", help="Where the run's coordinator listens.")
@click.option("--key", "key_path", type=click.Path(path_type=Path), required=True, help="A copy of the run's key file.")
@click.option("--name", help="A name that no other worker of the run has had.  [default: host and process]")
@click.option("--host", help="The address that the other workers reach this one at.")
def worker(job: Path, address: str, key_path: Path, name: str | None, host: str | None) -> None:
    """Be a worker of a run that was started elsewhere."""
    from shoal.launch.manual import join

    own = name or f"{socket.gethostname()}-{os.getpid()}"
    click.get_current_context().exit(join(job, address, key_path, own, host))


ALL = (train, status, list_, scale, stop, worker)
