"""Verbs that serve, and steer what is served: serve, versions, promote, rollback."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from shoal.cli.using import as_json, at_job, at_signer, at_version

_A_PATH = click.Path(path_type=Path)
at_service = click.argument("service", required=False)


@click.command()
@click.argument("run", metavar="RUN|PACKAGE", default="latest")
@at_version
@at_job
@at_signer
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8000, show_default=True)
@click.option("--grpc-port", type=int, help="Answer over gRPC, too, at this port.")
@click.option("--name", help="The service's, for `shoal versions` and the like.  [default: the run's]")
@click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Processes with the model.")
@click.option("--threads", type=click.IntRange(min=1), help="Torch's, in each.  [default: cores but one, by replicas]")
@click.option("--max-batch", type=int, default=64, show_default=True, help="Samples that are computed at once.")
@click.option("--max-queue", type=int, default=512, show_default=True, help="Requests that wait at most.")
@click.option("--max-wait", type=float, default=1.0, show_default=True, help="Seconds that one will wait at most.")
@click.option("--max-body", type=int, default=64 * 2**20, show_default=True, help="Bytes of a request at most.")
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds for a request that says none.")
@click.option("--load-timeout", type=float, default=120.0, show_default=True, help="Seconds for a model to load.")
@click.option("--follow", is_flag=True, help="Take each new version of the run, if it passes the gate.")
@click.option("--gate", "gates", multiple=True, metavar="CHECK", help="As accuracy>=0.9 or loss<=live+0.01.")
@click.option("--gate-timeout", type=float, default=600.0, show_default=True, help="Seconds for all that it looks at.")
@click.option("--shadow", type=click.IntRange(min=0), default=50, show_default=True, help="Requests to mirror first.")
@click.option("--canary", default="0.1,0.5", show_default=True, help="Shares of requests to answer then; or none.")
@click.option("--canary-requests", type=click.IntRange(min=0), default=50, show_default=True, help="At each share.")
@click.option("--stage", type=float, default=30.0, show_default=True, help="Seconds after which a stage is over.")
@click.option("--watch", type=float, default=60.0, show_default=True, help="Seconds in which it may be rolled back.")
@click.option("--key-file", type=_A_PATH, help="Of the key that a request needs.  [default: $SHOAL_SERVE_KEY, or none]")
@click.option(
    "--admin-key-file", type=_A_PATH, help="Of the key for changes.  [default: $SHOAL_ADMIN_KEY, or a new one]"
)
@click.option("--admin-port", type=int, default=0, help="Where changes are asked for.  [default: a free one]")
@click.option("--tls-cert", type=_A_PATH, help="A certificate in PEM: then it is https.")
@click.option("--tls-key", type=_A_PATH, help="Its private key in PEM.")
@click.option("--access-log", metavar="FILE", help="A line for each request; - for standard error.")
@click.option("--traces", is_flag=True, help="Send a span of each request to an OpenTelemetry collector.")
def serve(
    run: str, version: int | None, job_file: Path | None, signed_by: Path | None, **given: Any
) -> None:  # fmt: skip
    """Answer predictions by the Open Inference Protocol v2, from processes that are replaced if they end."""
    from shoal.launch.ending import heeds_sigterm

    with heeds_sigterm():  # what follows takes seconds to import
        from shoal.launch.service import Target, run_service

        run_service(Target(run, version, job_file, signed_by), _serving(given), _say_where)


def _serving(given: dict[str, Any]) -> Any:
    from shoal.launch.service import Serving
    from shoal.rollout import Policy, parse_threshold
    from shoal.service.conductor import Plan
    from shoal.serving.batching import Batching
    from shoal.serving.limits import Limits
    from shoal.serving.server import Tls

    if (given["tls_cert"] is None) != (given["tls_key"] is None):
        raise click.UsageError("--tls-cert and --tls-key go together")
    policy = Policy(
        gates=tuple(map(parse_threshold, given["gates"])),
        gate_s=given["gate_timeout"],
        shadow_requests=given["shadow"],
        canary_shares=_shares(given["canary"]),
        canary_requests=given["canary_requests"],
        stage_s=given["stage"],
        watch_s=given["watch"],
    )
    bounds = {"max_samples": given["max_batch"], "max_requests": given["max_queue"], "max_wait_s": given["max_wait"]}
    plan = Plan(
        num_replicas=given["replicas"], batching=Batching(**bounds), policy=policy, follows=given["follow"]
    )  # fmt: skip
    return Serving(
        host=given["host"],
        port=given["port"],
        grpc_port=given["grpc_port"],
        admin_port=given["admin_port"],
        name=given["name"],
        plan=plan,
        limits=Limits(max_body_bytes=given["max_body"], timeout_s=given["timeout"]),
        load_s=given["load_timeout"],
        num_threads=given["threads"],
        key_file=given["key_file"],
        admin_key_file=given["admin_key_file"],
        tls=Tls(given["tls_cert"], given["tls_key"]) if given["tls_cert"] is not None else None,
        access_log=given["access_log"],
        traces=given["traces"],
    )


def _shares(text: str) -> tuple[float, ...]:
    try:
        return () if text == "none" else tuple(map(float, text.split(",")))
    except ValueError:
        raise click.UsageError(f"--canary is shares such as 0.1,0.5, or none; not {text!r}") from None


def _say_where(url: str) -> None:
    click.echo(f"serving at {url}", err=True)


@click.command()
@at_service
@as_json
def versions(service: str | None, json_: bool) -> None:
    """Which versions a service has: the one that answers, the one before it, and one that is on its way."""
    _tell(_told(service, "GET", "/status"), json_)


@click.command()
@at_service
@at_version
@as_json
def promote(service: str | None, version: int | None, json_: bool) -> None:
    """Have a version answer now, whatever the gate says: the one on its way, or one that is stored."""
    _tell(_told(service, "POST", "/promote", {"version": version}), json_)


@click.command()
@at_service
@as_json
def rollback(service: str | None, json_: bool) -> None:
    """Give up the version that is being tried, or have the one before the live one answer again."""
    _tell(_told(service, "POST", "/rollback", {}), json_)


def _told(service: str | None, method: str, path: str, demand: dict[str, Any] | None = None) -> dict[str, Any]:
    from shoal.launch.services import find_service, told

    return told(find_service(service), method, path, demand)


def _tell(status: dict[str, Any], json_: bool) -> None:
    if json_:
        click.echo(json.dumps(status))
        return
    for line in table(status):
        click.echo(line)


def service_lines(status: dict[str, Any]) -> list[str]:
    """A service, and its versions."""
    return [f"service {status['service']} at {status['url']}, {status['waiting']} requests wait", *table(status)]


def table(status: dict[str, Any]) -> list[str]:
    """A service's versions, a line each."""
    candidate = status["candidate"] or {}
    roles = {status["previous"]: "previous", status["live"]: "live", candidate.get("version"): candidate.get("stage")}
    lines = []
    for version, about in sorted(status["loaded"].items(), key=lambda item: -int(item[0])):
        age = "" if about["stored_s"] is None else f"stored {time.time() - about['stored_s']:.0f} s ago"
        figures = "  ".join(f"{name} {value:.4g}" for name, value in about["figures"].items() if _is_number(value))
        role = roles.get(int(version)) or "loaded"
        lines.append(f"{version:>10}  {role:9} {len(about['pids'])} processes  {age}  {figures}".rstrip())
    if candidate and str(candidate["version"]) not in status["loaded"]:
        lines.append(f"{candidate['version']:>10}  {candidate['stage']}")
    if status["refused"]:
        lines.append(f"refused: {', '.join(map(str, status['refused']))}")
    return lines


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


ALL = (serve, versions, promote, rollback)
