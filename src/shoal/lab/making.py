"""How a lab comes and goes: the plan's commands, carried out in order, with a record from the first to the last."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import ConfigError, Fault
from shoal.lab import cgroups, kernel, plan, records, warm
from shoal.lab.records import HostRecord, LabRecord, Process
from shoal.lab.spec import HostSpec, LabSpec, Link

_END_S = 10.0
_TAKE_LONG = (
    "torch", "torch._dynamo",
    "numba.core.registry:cpu_target.typing_context.refresh", "numba.core.registry:cpu_target.target_context.refresh",
)  # fmt: skip
"""To import, or to call: what the first optimizer of a process and its first compiled loop do. None of them starts a
thread by that."""


def claim(name: str, hosts: Sequence[HostSpec], owner: Process | None) -> LabRecord:
    """Take a name and a subnet, and make the bridge. ``ConfigError`` if the name is in use."""
    groups = cgroups.find()
    if groups is None and any(host.cores is not None for host in hosts):
        raise cgroups.needed()
    with records.locked():
        if records.path_of(name).exists():
            raise _in_use(records.read(name))
        if kernel.is_up(plan.bridge(name)) is not None or kernel.namespace_path(plan.namespace(name, 0)).exists():
            raise ConfigError(
                f"the name {name!r} is in use, by an interface {plan.bridge(name)} or a network namespace "
                f"{plan.namespace(name, 0)} that no lab of this user made; take another name"
            )
        record = LabRecord(
            name=name,
            subnet=plan.free_subnet(kernel.used_networks()),
            hosts=tuple(
                HostRecord(str(host.link), host.delay_s, host.cores, _group(groups, name, n))
                for n, host in enumerate(hosts)
            ),
            owner=owner,
        )
        records.write(record)
        kernel.do(plan.make_bridge(name, record.subnet))
    return record


def _group(groups: cgroups.Groups | None, name: str, host: int) -> str | None:
    return None if groups is None else str(groups.root / f"shoal-{name}-h{host}")


def _in_use(record: LabRecord) -> ConfigError:
    name = record.name
    if record.is_left_over:
        return ConfigError(f"the lab {name!r} was left over from a run that crashed; `shoal lab down {name}` clears it")
    by = f"by process {record.owner.pid}" if record.owner else "and stays until it is taken down"
    return ConfigError(f"there is a lab {name!r} already, {by}; take another name, or end it: `shoal lab down {name}`")


def make(record: LabRecord, spec: LabSpec) -> tuple[LabRecord, list[subprocess.Popen[Any]]]:
    """Make all but the bridge. The record with its helpers, and those as children."""
    name, hosts, helpers = record.name, spec.each(), []
    if spec.warm:
        helpers.append(_serve_forks(name))
        record = msgspec.structs.replace(record, warm=Process.of(helpers[-1].pid))
        records.write(record)
    for n, host in enumerate(hosts):
        kernel.do(plan.make_namespace(name, n))
        if host.delay_s and not _kernel_can_hold(name, n):
            helpers.append(_relay(record, n, host.delay_s))
            record = msgspec.structs.replace(record, helpers=(*record.helpers, Process.of(helpers[-1].pid)))
            records.write(record)
            _wait_until_ready(helpers[-1])
        else:
            kernel.do(plan.make_link(name, n))
        kernel.do(plan.connect(name, n, record.subnet))
        shape(record, n, host.link)
        _make_group(record.hosts[n])
    if not all(kernel.can(command) for command in plan.choose_cubic(name, len(hosts), record.subnet)):
        raise Fault("the kernel has no TCP congestion control named cubic, which is what the lab measures with")
    return record, helpers


def _make_group(host: HostRecord) -> None:
    if host.group is not None:
        group = Path(host.group)
        group.mkdir(exist_ok=True)
        cgroups.limit(group, host.cores)


def shape(record: LabRecord, host: int, link: Link) -> None:
    """Limit a host's link, and keep its delay."""
    kernel.do(plan.shape(record.name, host, link))
    delay_s = record.hosts[host].delay_s
    if delay_s and not record.helpers:
        kernel.do([plan.hold(record.name, host, delay_s, link.up)])


def _kernel_can_hold(name: str, host: int) -> bool:
    """Whether there is netem: tried on the loopback of a host that is just being made."""
    space = plan.namespace(name, host)
    tried = ("tc", "-n", space, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    return kernel.can(tried) and kernel.can(("tc", "-n", space, "qdisc", "del", "dev", "lo", "root"))


def _relay(record: LabRecord, host: int, delay_s: float) -> subprocess.Popen[Any]:
    ends = [plan.namespace(record.name, host), plan.inner(record.name, host), plan.outer(record.name, host)]
    command = [sys.executable, "-m", "shoal.lab.relay", *ends, str(delay_s)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def _wait_until_ready(relay: subprocess.Popen[Any]) -> None:
    assert relay.stdout is not None
    with relay.stdout:
        said = relay.stdout.readline().strip()
    if said != "ready":
        raise ConfigError(said or "the process that was to delay a link has ended without a word")


def _serve_forks(name: str) -> subprocess.Popen[Any]:
    command = [sys.executable, "-I", warm.__file__, "serve", str(records.warm_path(name)), *_TAKE_LONG]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def prefix(record: LabRecord, host: int) -> tuple[str, ...]:
    """The words that run a command on a host, and within its share of the processor."""
    name, group = record.name, record.hosts[host].group
    words = (*cgroups.entering(group), "ip", "netns", "exec", plan.namespace(name, host))
    if record.warm is None:
        return words
    return (*words, sys.executable, "-I", "-S", warm.__file__, "run", str(records.warm_path(name)), group or "")


def unmake(record: LabRecord) -> None:
    """Remove all that there is of a lab, and kill what runs in it and nothing else."""
    num_hosts = len(record.hosts)
    if record.warm is not None:  # before its forks, so that none comes after them
        _end([record.warm])
    for n in range(num_hosts):
        kernel.kill_all(plan.namespace(record.name, n))
    _end(record.helpers)
    for command in plan.unmake(record.name, num_hosts):
        kernel.can(command)
    for host in record.hosts:
        if host.group is not None:
            cgroups.remove(Path(host.group))
    if kernel.is_up(plan.bridge(record.name)) is not None:
        raise Fault(f"the bridge {plan.bridge(record.name)} could not be removed; are you who made it?")
    if record.folder is not None:
        shutil.rmtree(record.folder, ignore_errors=True)
    records.remove(record.name)


def end_owner(owner: Process, record: Path) -> None:
    """SIGTERM to who is to take a lab down, and a while for it to do so."""
    if owner.is_alive:
        kernel.signal_all(signal.SIGTERM, [owner.pid])
    deadline_s = time.monotonic() + _END_S
    while owner.is_alive and record.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _end(helpers: Sequence[Process]) -> None:
    helpers = [helper for helper in helpers if helper.is_alive]
    kernel.signal_all(signal.SIGKILL, [helper.pid for helper in helpers])
    deadline_s = time.monotonic() + _END_S
    while any(helper.is_alive for helper in helpers) and time.monotonic() < deadline_s:
        time.sleep(0.005)
