"""The verbs of a lab: run, up, exec, status, fault, down."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shoal.errors import ConfigError, ShoalError
from shoal.lab import Lab, LabSpec, discard, labs, why_not
from shoal.lab.records import LabRecord

_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}

named = click.option("--name", envvar="SHOAL_LAB", help="Which lab.  [default: $SHOAL_LAB, else the only one]")
as_json = click.option("--json", "json_", is_flag=True, help="Print one JSON value.")


def _described(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say what a lab is to be."""
    options = (
        click.option("--hosts", type=int, required=True, help="How many hosts; they are numbered from 0."),
        click.option(
            "--link", multiple=True, metavar="[HOST=]RATE[/RATE]", help="Rate, or rates up and down: 100mbit."
        ),
        click.option("--delay", multiple=True, metavar="[HOST=]TIME", help="What a host sends arrives later: 20ms."),
        click.option("--cpu", multiple=True, metavar="[HOST=]CORES", help="What a host may use of the processor: 0.5."),
        click.option("--warm", is_flag=True, help="Load torch once: the hosts' Python processes are forks."),
        click.option("--name", help="The lab's name, of at most 10 characters.  [default: made up]"),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def lab() -> None:
    """A cluster in a box: hosts with addresses of their own, shaped links, and faults."""


@lab.command(context_settings=_PASSED_ON)
@_described
@click.option("--faults", type=click.Path(path_type=Path), help="A TOML file of faults with times.")
@click.option("--ray", is_flag=True, help="Start a node of Ray on each host, and run the command on host 0.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...], faults: Path | None, ray: bool, **asked: Any) -> None:
    """Make a lab, run a command with it, take it down; exits as the command does."""
    from shoal.lab import running

    order = running.Order(spec=LabSpec(**asked), command=command, faults=_text(faults), ray=ray)
    act = running.run_as_user if why_not() else running.run
    click.get_current_context().exit(act(order))


def _text(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the faults in {path} cannot be read: {error}") from None


@lab.command()
@_described
def up(**asked: Any) -> None:
    """Make a lab that stays until `shoal lab down`. Needs root."""
    made = Lab(LabSpec(**asked)).up(stays=True)
    for host in made.hosts:
        click.echo(f"{host.name:5} {host.address}")
    click.echo(f"{made.name} is up; to train on it: export SHOAL_HOSTS={made.env['SHOAL_HOSTS']}")


@lab.command("exec", context_settings=_PASSED_ON)
@named
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(name: str | None, host: str, command: tuple[str, ...]) -> None:
    """Run a command on a host of a lab that is up."""
    found = _find(name)
    words = [*found.host(host).prefix, *command[command[0] == "--" :]]
    os.execvpe(words[0], words, {**os.environ, **found.env})


def _find(name: str | None) -> Lab:
    if name is None:
        names = [record.name for record in labs()]
        if len(names) != 1:
            there = f"there are {', '.join(names)}: say which with --name" if names else "there is none"
            raise ConfigError(f"a lab is needed, and {there}; `shoal lab up` makes one")
        name = names[0]
    return Lab.find(name)


@lab.command()
@click.argument("name", required=False)
@click.option("--measure", is_flag=True, help="Measure the links, too: a second a host.")
@as_json
def status(name: str | None, measure: bool, json_: bool) -> None:
    """The labs that there are: limits, bytes and processes by the kernel's account."""
    rows = [_row(record, measure) for record in ([Lab.find(name).record] if name else labs())]
    if json_:
        click.echo(json.dumps(rows))
    elif not rows:
        click.echo("there are no labs")
    for row in [] if json_ else rows:
        _tell(row)
    if any(not rate["is_right"] for row in rows for rate in row["measured"]):
        click.get_current_context().exit(1)


def _row(record: LabRecord, measure: bool) -> dict[str, Any]:
    from shoal.lab.status import look, verify

    row: dict[str, Any] = {"lab": record.name, "subnet": record.subnet, "is_left_over": record.is_left_over}
    row |= {"owner": record.owner.pid if record.owner else None, "hosts": [], "measured": [], "problem": ""}
    try:
        found = Lab.find(record.name)
        row["hosts"] = look(found)
        row["measured"] = verify(found) if measure else []
    except ShoalError as error:  # half made, half gone, or gone
        row["problem"] = str(error)
    return row


def _tell(row: dict[str, Any]) -> None:
    stands = f"of process {row['owner']}" if row["owner"] else "stays until it is taken down"
    if row["is_left_over"]:
        stands = f"left over from a run that crashed; `shoal lab down {row['lab']}` clears it"
    click.echo(f"{row['lab']}  {row['subnet']}  {stands}")
    for host in row["hosts"]:
        cores = "all" if host["cores"] is None else f"{host['cores']:g}"
        link = host["link"] if host["link"] == host["asked"] else f"{host['link']} (asked: {host['asked']})"
        marks = [mark for mark, holds in (("CUT", host["is_cut"]), ("FROZEN", host["num_frozen"])) if holds]
        late = f"  +{host['delay_s'] * 1e3:g} ms" if host["delay_s"] else ""
        sizes = f"sent {host['sent_bytes']:,} B  received {host['received_bytes']:,} B"
        click.echo(
            f"  {host['host']:5} {host['address']:14} {link}{late}  {sizes}  "
            f"cores {cores}  processes {host['num_processes']}  {' '.join(marks)}".rstrip()
        )
    for rate in row["measured"]:
        allowed = "no limit" if rate["allowed"] is None else f"{rate['allowed'] / 1e6:.2f} allowed"
        wrong = "" if rate["is_right"] else "  NOT THE RATE OF THE LINK"
        click.echo(
            f"  {rate['from']} to {rate['to']}: {rate['measured'] / 1e6:.2f} Mbit/s of payload, {allowed}{wrong}"
        )
    if row["problem"]:
        click.echo(f"  {row['problem']}")


@lab.command()
@named
@click.argument("do")
@click.argument("host")
@click.argument("to", required=False)
def fault(name: str | None, do: str, host: str, to: str | None) -> None:
    """Do something to a host: cut, heal, slow, kill, freeze, thaw, cpu.

    TO is the link of slow (10mbit, 10mbit/100mbit) or the cores of cpu (0.33); without it, what was asked for at first.
    """
    from shoal.lab.faults import one_fault
    from shoal.lab.inflicting import inflict

    found = _find(name)
    meant = one_fault(do, host, to, len(found.hosts))
    inflict(found, meant)
    click.echo(f"{found.name}: {meant}")


@lab.command()
@click.argument("name", required=False)
@click.option(
    "--all", "all_", is_flag=True, help="Every lab that stays or was left over; not one that a process holds."
)
def down(name: str | None, all_: bool) -> None:
    """Take a lab down, with all that runs in it; also what a crashed run left over."""
    if (name is None) != all_:
        raise click.UsageError("give the name of a lab, or --all")
    names = [name] if name else [record.name for record in labs() if record.owner is None or record.is_left_over]
    for each in names:
        discard(each)
        click.echo(f"{each} is down")
    if not names:
        click.echo("there was nothing to take down")


ALL = (lab,)
