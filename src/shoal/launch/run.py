"""A run: how it is begun, resumed, and what is known of it afterwards."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.comm.keys import JobKey
from shoal.errors import ConfigError, ShoalError, StoreFault
from shoal.events import Event, read_events
from shoal.launch.driver import Driver, Stopping
from shoal.launch.local import LocalFleet
from shoal.launch.nursery import warm_up
from shoal.launch.progress import Progress, Silent, progress_for
from shoal.training.folder import RunFolder

if TYPE_CHECKING:
    from shoal.job import Job

_MOST_WORKERS = 1024
_HIGHEST_PORT = 65535


@dataclass(frozen=True)
class Size:
    """How many workers: as many as ``target``, and never fewer than ``least`` or more than ``most``."""

    target: int
    least: int = 1
    most: int = _MOST_WORKERS

    @staticmethod
    def parse(text: str | int) -> Size:
        """``4``: four, and it goes on with fewer while one is replaced. ``2..8``: eight, and never fewer than two."""
        low, dots, high = str(text).partition("..")
        try:
            numbers = [int(low)] + ([int(high)] if dots else [])
        except ValueError:
            raise ConfigError(f"workers must be a number such as 4 or a range such as 2..8, not {text!r}") from None
        if min(numbers) < 1 or (dots and numbers[0] > numbers[1]):
            raise ConfigError(f"workers must be at least 1, and a range must not fall; {text!r} does not fit")
        return Size(numbers[1], numbers[0], numbers[1]) if dots else Size(numbers[0], 1, max(numbers[0], _MOST_WORKERS))


@dataclass(frozen=True)
class Run:
    """A run that was started here, or found by its folder."""

    path: Path
    outcome: str = ""
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def record(self) -> dict[str, Any]:
        """What it was started with."""
        return RunFolder(self.path).read_record()

    @property
    def events(self) -> list[Event]:
        """Everything that happened, oldest first."""
        return read_events(RunFolder(self.path).events_path)[0]


def runs_folder() -> Path:
    """Where runs are kept: ``$SHOAL_RUNS``, else ``runs`` here."""
    return Path(os.environ.get("SHOAL_RUNS", "runs"))


def find_run(name: str | Path) -> RunFolder:
    """A run by its folder or its name; ``latest`` is the newest. ``ConfigError`` if there is none."""
    if str(name) == "latest":
        found = list_runs()
        if not found:
            raise ConfigError(f"there are no runs in {runs_folder().resolve()}")
        return RunFolder(found[0].path)
    path = Path(name) if (Path(name) / "run.json").exists() else runs_folder() / name
    folder = RunFolder(path.resolve())
    folder.read_record()
    return folder


def list_runs() -> list[Run]:
    """The runs in ``runs_folder``, newest first."""
    folders = sorted(runs_folder().glob("*/run.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [finished_run(RunFolder(path.parent.resolve())) for path in folders]


def finished_run(folder: RunFolder) -> Run:
    """A run as its event log tells it: ``outcome`` is empty while it is under way or was cut off."""
    outcome = reason = ""
    figures: dict[str, Any] = {}
    for event in read_events(folder.events_path)[0]:
        if event["kind"] == "ended":
            outcome, reason = event["outcome"], event["reason"]
            figures = event.get("figures") or figures
        elif event["kind"] == "generation":
            outcome = reason = ""
    return Run(folder.path, outcome, reason, figures)


def train(
    job: Job | str | Path,
    *,
    workers: int | str = 1,
    on: str = "local",
    name: str | None = None,
    settings: Sequence[str] = (),
    options: TrainOptions | None = None,
) -> Run:
    """Train ``job``, a ``Job`` or the path of a file that defines one, and return when the run has ended.

    ``workers``: a number, or a range such as ``"2..8"``. ``on``: ``local``, ``hosts`` (those that ``SHOAL_HOSTS``
    names, as `shoal lab run` sets it), ``ray``, or ``manual`` (workers are started by hand). ``settings`` replace
    fields of the job: ``["global_batch=128"]``. Raises ``ConfigError`` for what cannot be run, and a ``ShoalError`` if
    the run fails; what was stored is kept. Ctrl-C stores the newest step and stops.
    Workers of a ``Job`` are forks of this process, with one thread each; those of a file share the machine's cores.
    """
    options = options or TrainOptions()
    size = Size.parse(workers)
    fleet = _fleet_for(job, on, size.target, settings, options)
    try:
        folder = _new_folder(_stem(job), name)
        record = fleet.about | {
            "name": folder.name,
            "job_file": str(Path(job).resolve()) if isinstance(job, str | Path) else None,
            "workers": size.target,
            "min_workers": size.least,
            "max_workers": size.most,
            "on": on,
            "listen": options.listen,
            "store": options.store or str(folder.path),
            "num_started": 0,
            "started_at_s": time.time(),
        }
        JobKey.make().write(folder.key_path)
    except BaseException:
        fleet.close()
        raise
    return drive(folder, record, fleet, options)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """``store``: a folder or URL for versions, if not the run's folder. ``listen``: host:port for the coordinator.
    ``progress``: where to tell how it goes; by default a bar on a terminal, else lines."""

    store: str | None = None
    listen: str | None = None
    progress: Progress | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        host, _, port = (self.listen or "127.0.0.1:0").rpartition(":")
        if not host or not port.isdecimal() or int(port) > _HIGHEST_PORT:
            raise ConfigError(f"listen takes HOST:PORT, such as 10.0.0.1:7000, not {self.listen!r}")

    def shown(self) -> Progress:
        return self.progress or (Silent() if self.quiet else progress_for(sys.stderr))


def resume(
    run: str | Path,
    *,
    workers: int | str | None = None,
    settings: Sequence[str] = (),
    from_step: int | None = None,
    job: Job | None = None,
    options: TrainOptions | None = None,
) -> Run:
    """Go on with a run that was stopped, failed or was killed, from its newest stored version.

    At the same number of workers the result is bit for bit that of a run that never stopped. A damaged version is
    refused with the one before it on offer: ``from_step`` takes it, and the damaged ones are deleted.
    """
    options = options or TrainOptions()
    folder = find_run(run)
    record = folder.read_record()
    with folder.held():
        _check_newest(record, from_step)
    settings = [*record["settings"], *settings]
    source = job or record["job_file"]
    if source is None:
        raise ConfigError(
            f"{folder.name} was started from Python; resume it there: shoal.resume({folder.name!r}, job=job)"
        )
    size = Size(record["workers"], record["min_workers"], record["max_workers"])
    size = size if workers is None else Size.parse(workers)
    fleet = _fleet_for(source, record["on"], size.target, settings, options)
    record |= fleet.about
    if options.listen is not None:
        record["listen"] = options.listen
    record |= {"workers": size.target, "min_workers": size.least, "max_workers": size.most}
    logs = [p.stem[1:] for p in (folder.path / "logs").glob("w*.log")]
    record["num_started"] = 1 + max((int(number) for number in logs if number.isdigit()), default=-1)
    return drive(folder, record, fleet, options)


def _check_newest(record: dict[str, Any], from_step: int | None) -> None:
    from shoal.versions import Store, Versions

    versions = Versions(Store(record["store"]))
    good, refused = versions.newest_good()
    newest = good.step if good else 0
    if refused and from_step != newest:
        reasons = "; ".join(entry.reason for entry in refused)
        raise ConfigError(f"{reasons}. The newest good version is {newest}: add --from-step {newest}")
    if from_step not in (None, newest):
        raise ConfigError(f"the newest good version is {newest}, and only it can be gone on from, not {from_step}")
    for entry in refused:
        versions.discard(entry.step)


def drive(folder: RunFolder, record: dict[str, Any], fleet: Any, options: TrainOptions) -> Run:
    """Run what is recorded, with workers from ``fleet``, to its end."""
    try:
        with folder.held():
            folder.write_record(record)
            progress = options.shown()
            fleet.settle(folder, record, progress.say)
            progress.say(
                f"run {folder.name}: {record['total_steps']} steps, {record['workers']} workers, in {folder.path}"
            )
            with _stopped_by_sigterm():
                ended, exit_code = Driver(folder, record, fleet, progress).run()
    except Stopping as stopping:
        fleet.close()
        raise Stopped(finished_run(folder), stopping.exit_code) from None
    except BaseException:
        fleet.close()
        raise
    run = finished_run(folder)
    run = Run(run.path, ended.outcome, ended.reason, run.figures)
    if ended.outcome not in ("done", "stopped"):
        raise ShoalError(f"{folder.name} failed: {ended.reason}; {_what_is_kept(record)}")
    if exit_code is not None:
        raise Stopped(run, exit_code)
    return run


class Stopped(ShoalError):
    """The run was stopped by Ctrl-C or SIGTERM; what it had committed is stored."""

    def __init__(self, run: Run, exit_code: int) -> None:
        super().__init__(f"{run.name} was stopped: {run.reason}; `shoal train --resume {run.name}` goes on")
        self.run = run
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        return Stopped, (self.run, self.exit_code)


def _what_is_kept(record: dict[str, Any]) -> str:
    from shoal.versions import Store, Versions

    try:
        newest = Versions(Store(record["store"])).newest()
    except StoreFault as error:
        return f"what is stored cannot be told: {error}"
    return f"the newest stored version is of step {newest}" if newest is not None else "no version is stored"


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_sigterm(*_: Any) -> None:
        raise Stopping(143)

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stem(job: Job | str | Path) -> str:
    return Path(job).stem if isinstance(job, str | Path) else type(job.task).__name__.lower()


def _new_folder(stem: str, name: str | None) -> RunFolder:
    base = runs_folder()
    stamp = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for candidate in [name] if name else [stamp, *(f"{stamp}-{attempt}" for attempt in range(1, 100))]:
        path = base / candidate
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot make the run's folder {path}: {error}") from error
        return RunFolder(path.resolve())
    raise ConfigError(f"there is a run named {name or stamp} in {base} already; `shoal train --resume` goes on with it")


def _fleet_for(job: Job | str | Path, on: str, num_workers: int, settings: Sequence[str], options: TrainOptions) -> Any:
    if on not in ("local", "hosts", "ray", "manual"):
        raise ConfigError(f"on must be local, hosts, ray or manual, not {on!r}")
    if not isinstance(job, str | Path):
        if on != "local":
            raise ConfigError(f"on={on!r} needs a job file, since its code must travel to other machines")
        return _with_gpus(_fleet_of_value(job, settings), num_workers)
    if on == "hosts":
        from shoal.launch.hosts import HostsFleet

        return HostsFleet(Path(job), settings, num_workers)
    local = LocalFleet.of_file(Path(job), settings)
    if on == "local":
        return _with_gpus(local, num_workers)
    local.close()
    if on == "manual":
        from shoal.launch.manual import ManualFleet

        return ManualFleet(local.about, options.listen)
    from shoal.launch.ray import RayFleet

    return RayFleet(local.about, Path(job), settings)


def _with_gpus(fleet: LocalFleet, num_workers: int) -> LocalFleet:
    """The fleet, if this machine has a GPU for each worker that wants one; else ``ConfigError``."""
    num_gpus = fleet.about["num_gpus"]
    if num_gpus and num_workers > num_gpus:
        fleet.close()
        raise ConfigError(f"{num_workers} workers with device='cuda' need a GPU each, and there are {num_gpus} here")
    return fleet


def _fleet_of_value(job: Job, settings: Sequence[str]) -> LocalFleet:
    def load() -> tuple[Any, dict[str, Any]]:
        warm_up()
        from shoal.job import override, parse_settings
        from shoal.launch.rehearsal import about, compile_loops

        changed = override(job, parse_settings(settings))
        if (changed.num_threads or 1) > 1:
            raise ConfigError(
                f"num_threads={changed.num_threads} needs a job file: workers of a job from Python are forks of this"
                " process, and have one thread each"
            )
        compile_loops(changed)
        return changed, about(changed, f"pid-{os.getpid()}", settings)

    return LocalFleet.of_value(load)
