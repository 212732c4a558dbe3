"""``shoal serve``: a service from a run or a package, until it is told to end."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.clock import SystemClock
from shoal.errors import ConfigError
from shoal.events import EventLog
from shoal.launch.exporting import is_package
from shoal.launch.services import Record, ServiceFolder, services_folder
from shoal.launch.using import folder_of
from shoal.service.conductor import Conductor, Plan, Stock
from shoal.service.release import Pool, Release
from shoal.service.replica import Loading
from shoal.service.switch import Switch
from shoal.service.wire import Source
from shoal.serving.access import Key
from shoal.serving.extra import serve_extra
from shoal.serving.limits import Limits
from shoal.serving.package import read
from shoal.serving.server import Tls, listen, model_url, signals, url_of
from shoal.training.folder import RunFolder
from shoal.versions import Store, Versions

if TYPE_CHECKING:
    from shoal.serving.inference import Face
    from shoal.serving.rpc import GrpcServer
    from shoal.serving.seen import Seen
    from shoal.serving.traces import Traces

KEY_VARIABLE = "SHOAL_SERVE_KEY"
ADMIN_KEY_VARIABLE = "SHOAL_ADMIN_KEY"
_GC_THRESHOLDS = (20_000, 20, 20)
_GRACE_S = 10.0
_REMOTE_POLL_S = 2.0


class RunStock:
    """The versions of a run."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = str(folder.path)
        record = folder.read_record()
        if record["job_file"] is None:
            raise ConfigError(
                f"{record['name']} was started from Python, and a model's process needs the file of its job"
            )
        self._versions = Versions(Store(record["store"]))
        self.is_remote = "://" in record["store"]

    def newest(self) -> int | None:
        return self._versions.newest()

    def steps(self) -> Sequence[int]:
        return self._versions.steps()

    def source(self, version: int) -> Source:
        if version not in self.steps():
            raise ConfigError(f"version {version} is not stored; those that are: {self.steps()}")
        return Source(self._path, version)


class PackageStock:
    """The one version of a package, all of it checked."""

    def __init__(self, path: Path, job_file: Path | None, signed_by: Path | None) -> None:
        package = read(path, signed_by)
        if job_file is None:
            told = package.description.task
            raise ConfigError(f"{path} holds no code: give the file {told.job_file} of its task {told.name} with --job")
        self._version = package.description.version
        signer = None if signed_by is None else str(signed_by.resolve())
        self._source = Source(str(path.resolve()), job_file=str(job_file.resolve()), signed_by=signer)

    def newest(self) -> int | None:
        return self._version

    def steps(self) -> Sequence[int]:
        return [self._version]

    def source(self, version: int) -> Source:
        if version != self._version:
            raise ConfigError(f"the package is of version {self._version}, not {version}")
        return self._source


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a service is to be. ``key_file``: of the key that a prediction needs, else ``$SHOAL_SERVE_KEY``, else none.
    ``admin_key_file``: of the one that changes need, else ``$SHOAL_ADMIN_KEY``, else a new one in its folder.
    ``admin_port`` and ``grpc_port`` 0: a free one; without the latter there is no gRPC.
    ``access_log``: a file, or - for standard error. ``traces``: send spans to an OpenTelemetry collector."""

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    admin_port: int = 0
    name: str | None = None
    plan: Plan = field(default_factory=Plan)
    limits: Limits = field(default_factory=Limits)
    load_s: float = 120.0
    num_threads: int | None = None
    key_file: Path | None = None
    admin_key_file: Path | None = None
    tls: Tls | None = None
    access_log: str | None = None
    traces: bool = False


@dataclass(frozen=True)
class Target:
    """What is served: a run, of which perhaps one ``version``; or a package, with its task's ``job_file``, and perhaps
    the public key of who must have signed it."""

    path: str | Path
    version: int | None = None
    job_file: Path | None = None
    signed_by: Path | None = None


def stock_of(target: Target) -> tuple[str, Stock]:
    """What there is to serve of it, and a name for it. ``ConfigError`` for what is neither run nor package."""
    path = Path(target.path)
    if is_package(path):
        if target.version is not None:
            raise ConfigError(f"{path} is a package, of one version: leave --version out")
        return path.resolve().name, PackageStock(path, target.job_file, target.signed_by)
    for option, given in (("--job", target.job_file), ("--signed-by", target.signed_by)):
        if given is not None:
            raise ConfigError(f"{option} is for packages, and {path} is none: a run knows its job")
    folder = folder_of(target.path)
    return folder.name, RunStock(folder)


def run_service(target: Target, serving: Serving, announce: Callable[[str], object] = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT: then finish the requests at hand, end the model's processes, and end by that
    signal. Main thread only. ``announce`` is called with the model's address once it answers. ``ConfigError`` or
    ``Fault`` if that cannot be."""
    name, stock = stock_of(target)
    if isinstance(stock, PackageStock) and serving.plan.follows:
        raise ConfigError(f"{target.path} is a package, of one version: --follow is for runs")
    if isinstance(stock, RunStock) and stock.is_remote:
        plan = replace(serving.plan, poll_s=max(serving.plan.poll_s, _REMOTE_POLL_S))
        serving = replace(serving, plan=plan)
    folder = ServiceFolder((services_folder() / (serving.name or name)).resolve())
    lock = folder.claim()
    try:
        service = _Service(folder, stock, serving)
        number = _run(service.run(str(target.path), target.version, announce))
    finally:
        os.close(lock)
    if number:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _run(main: Coroutine[Any, Any, int]) -> int:
    with serve_extra():
        import uvloop
    return uvloop.run(main)


def _traces(name: str) -> Traces:
    from shoal.serving.traces import Traces

    return Traces(name)


class _Service:
    def __init__(self, folder: ServiceFolder, stock: Stock, serving: Serving) -> None:
        with serve_extra():
            from shoal.serving.seen import AccessLog, Seen
        self._folder = folder
        self._stock = stock
        self._serving = serving
        self._events = EventLog(folder.events_path)
        log = serving.access_log
        self._seen: Seen = Seen(AccessLog(None if log == "-" else Path(log)) if log else None)
        self._traces = _traces(folder.name) if serving.traces else None
        self._seen.traces = self._traces
        self._key = Key.found(serving.key_file, KEY_VARIABLE)
        self._admin_key = Key.found(serving.admin_key_file, ADMIN_KEY_VARIABLE) or Key(folder.new_key())
        self._switch = Switch()
        self._see()

    def note(self, kind: str, **fields: Any) -> None:
        """As ``Witness``."""
        self._events.append({"at_s": SystemClock().wall_s(), "kind": kind, "source": "service", **fields})
        self._seen.decisions.labels(kind).inc()

    def batch(self, num_samples: int, took_s: float) -> None:
        """As ``Witness``."""
        self._seen.batch.observe(num_samples)
        self._seen.compute_s.observe(took_s)

    async def run(self, target: str, version: int | None, announce: Callable[[str], object]) -> int:
        """The signal that ended it."""
        from shoal.serving.admin import admin_app
        from shoal.serving.app import App
        from shoal.serving.http1 import HttpServer
        from shoal.serving.inference import Face

        serving = self._serving
        with listen(serving.host, serving.port) as listener, listen("127.0.0.1", serving.admin_port) as admin_listener:
            conductor = self._conductor()
            face = Face(service=self._switch, limits=serving.limits, key=self._key, seen=self._seen)
            app = App(face)
            servers = [
                (HttpServer(app, serving.tls.context() if serving.tls else None, app), listener),
                (HttpServer(admin_app(conductor, self._admin_key, self)), admin_listener),
            ]
            grpc = await self._grpc(face)
            self._folder.write(self._record(target, url_of(listener, serving.tls), url_of(admin_listener), grpc))
            with signals() as ended:
                faces = [asyncio.create_task(server.serve(socket)) for server, socket in servers]
                rollout = asyncio.create_task(conductor.run())
                try:
                    await _first(ended, asyncio.create_task(conductor.start(version)))
                    if not ended.done():
                        _settle_memory()
                        announce(self._where(url_of(listener, serving.tls)))
                        self.note("serving", url=url_of(listener, serving.tls), pid=os.getpid())
                        await _first(ended, *faces, rollout)
                finally:
                    for server, _ in servers:
                        server.end()
                    closing = [grpc.stop(_GRACE_S)] if grpc is not None else []
                    await asyncio.gather(*faces, *closing, return_exceptions=True)
                    rollout.cancel()
                    await conductor.close()
                    if self._traces is not None:
                        await asyncio.to_thread(self._traces.close)
                    self.note("service_ended", pid=os.getpid())
                return ended.result() if ended.done() else 0

    async def _grpc(self, face: Face) -> GrpcServer | None:
        if self._serving.grpc_port is None:
            return None
        from shoal.serving.rpc import GrpcServer

        server = GrpcServer(face, self._serving.host, self._serving.grpc_port, self._serving.tls)
        await server.start()
        return server

    def _conductor(self) -> Conductor:
        serving = self._serving
        others = (os.cpu_count() or 1) - 1  # one core is for what is not the model
        num_threads = serving.num_threads or max(1, others // serving.plan.num_replicas)
        command = [sys.executable, "-m", "shoal.launch.replica"]
        loading = Loading(
            command=command, most_s=serving.load_s, num_threads=num_threads, batching=serving.plan.batching
        )
        pool = Pool(loading, serving.plan.num_replicas)
        return Conductor(self._stock, self._switch, pool, serving.plan, self)

    def _where(self, url: str) -> str:
        models = self._switch.versions()
        return model_url(url, models[0].name) if models else url

    def _record(self, target: str, url: str, admin_url: str, grpc: GrpcServer | None) -> Record:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        source = target if not isinstance(self._stock, RunStock) else Path(target).name
        return Record(
            name=self._folder.name, pid=os.getpid(), source=source, url=url, admin_url=admin_url, started_at=now,
            grpc=f"{self._serving.host}:{grpc.port}" if grpc is not None else "",
        )  # fmt: skip

    def _see(self) -> None:
        """Have the figures that change by themselves read off whenever they are asked for."""

        def of_live(read: Callable[[Release], float]) -> Callable[[], float]:
            return lambda: math.nan if self._switch.live is None else read(self._switch.live)

        def age_s(live: Release) -> float:
            return math.nan if live.held.stored_s is None else SystemClock().wall_s() - live.held.stored_s

        self._seen.version.set_function(of_live(lambda live: live.version))
        self._seen.waiting.set_function(of_live(lambda live: live.batcher.num_waiting))
        self._seen.age_s.set_function(of_live(age_s))


def _settle_memory() -> None:
    """What is there now stays: to look through it for garbage takes 0.2 s, in which nobody is answered. What requests
    leave is mostly no garbage of that kind: to look after each 700 objects took a tenth of the front's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


async def _first(ended: asyncio.Future[int], *tasks: asyncio.Task[None]) -> None:
    """Until it is to end, or one of these is done: what it raises is raised."""
    waited: set[asyncio.Future[Any]] = {ended, *tasks}
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()
