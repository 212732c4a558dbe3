"""Workers as actors of a Ray cluster, which places them, ends them and says when one has ended, and no more."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.comm.keys import JobKey
from shoal.comm.reach import unreachable
from shoal.errors import Bug, ConfigError
from shoal.launch.code import Code
from shoal.launch.fleet import Gone, Place
from shoal.launch.posting import Posting, serve
from shoal.training.folder import RunFolder

_CONNECT_S = 60.0
_ANSWER_S = 5.0
_LOOK_S = 1.0
_PROBE_S = 0.5
_PENDING_S = 10.0
_START_S = 90.0


class RayWorker:
    """A worker in a process of its own on a node of the cluster. A plain class; ``RayFleet`` makes actors of it."""

    def place(self) -> str:
        """Where this process is."""
        ray = imported_ray()
        worker_id = ray.get_runtime_context().get_worker_id()
        return f"on {ray.util.get_node_ip_address()}, pid {os.getpid()}, in Ray's worker {worker_id}"

    def run(self, code: Code, posting: Posting) -> tuple[int, str]:
        """Work to the end of the run; the exit code that a process would have, and the last words."""
        return serve(code, posting, str(imported_ray().util.get_node_ip_address()))


@dataclass
class _Hired:
    """An actor, and what is awaited of it."""

    actor: Any
    place: Any
    ended: Any
    since_s: float


class RayFleet:
    """Starts a worker in seconds, on the cluster of ``RAY_ADDRESS``, or on the one that this machine is of.

    ``about`` is what the record holds of the job. A worker takes as many CPUs as the job has threads, else one, and a
    GPU if its device is cuda. It ends with the driver. ``ConfigError`` if there is no cluster, or it refuses us.
    """

    def __init__(self, about: dict[str, Any], job_file: Path, settings: Sequence[str]) -> None:
        self._ray = imported_ray()
        self.about = about
        self._code = Code.of(job_file, about["files"])
        self._settings = tuple(settings)
        self._hired: dict[str, _Hired] = {}
        self._gone: list[Gone] = []
        self._folder: RunFolder | None = None
        self._looked_at_s = 0.0
        self._told = False
        self._connected_here = _connect(self._ray)
        self.host = str(self._ray.util.get_node_ip_address())
        self.wake_fd: int | None = None
        self._needs = {"CPU": about["job"]["num_threads"] or 1, "GPU": int(about["job"]["device"] == "cuda")}
        options = {"num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"], "max_restarts": 0}
        self._actor_class = self._ray.remote(**options, scheduling_strategy="SPREAD")(RayWorker)

    def settle(self, folder: RunFolder, record: dict[str, Any], say: Callable[[str], None]) -> None:
        """Where the run is that workers are started for."""
        self._folder, self._record, self._say = folder, record, say
        num_nodes = sum(node["Alive"] for node in self._ray.nodes())
        if num_nodes > 1 and self._stores_in_folder():
            say(f"warning: all {num_nodes} nodes must share {folder.path}, for versions go there; else give --store")

    def _stores_in_folder(self) -> bool:
        assert self._folder is not None
        return bool(self._record["store"] == str(self._folder.path))

    def places(self) -> list[Place]:
        """This machine: shards are no actors, for they keep what they hold in the run's folder."""
        return [Place(self.host)]

    def start(self, name: str, address: str) -> None:
        if self._folder is None:
            raise Bug("settle the fleet before workers are started")
        posting = Posting(
            name=name,
            address=address,
            key=JobKey.read(self._folder.key_path),
            store=self._record["store"],
            folder=str(self._folder.path) if self._stores_in_folder() else None,
            settings=self._settings,
            torch=self.about["identity"]["torch"],
        )
        options: dict[str, Any] = {"name": f"shoal-{self._folder.name}-{name}"}
        if dead := self._dead_nodes():
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(dead))})"}
        actor = self._actor_class.options(**options).remote()
        self._log(name, "asked of Ray")
        place = actor.place.remote()
        self._hired[name] = _Hired(actor, place, actor.run.remote(self._code, posting), time.monotonic())

    def _dead_nodes(self) -> frozenset[str]:
        """Nodes that Ray, slow to miss one, would still place a worker on, and that take no connection."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        return unreachable({n["NodeID"]: f"{n['NodeManagerAddress']}:{n['NodeManagerPort']}" for n in nodes}, _PROBE_S)

    def kill(self, name: str) -> None:
        """Ray may take seconds, or on a dead node minutes; the worker counts as gone from now."""
        hired = self._hired.pop(name, None)
        if hired is not None:
            self._ray.kill(hired.actor)
            self._gone.append(Gone(name, "was killed by the driver"))

    def gone(self) -> list[Gone]:
        by_ended = {hired.ended: name for name, hired in self._hired.items()}
        for ended in self._ready(list(by_ended)):
            self._gone.append(self._bury(by_ended[ended]))
        now_s = time.monotonic()
        if now_s - self._looked_at_s > _LOOK_S:
            self._looked_at_s = now_s
            self._look_at_starts(now_s)
        gone, self._gone = self._gone, []
        return gone

    def _ready(self, futures: list[Any]) -> list[Any]:
        if not futures:
            return []
        ready: list[Any] = self._ray.wait(futures, num_returns=len(futures), timeout=0, fetch_local=False)[0]
        return ready

    def _bury(self, name: str) -> Gone:
        hired = self._hired.pop(name)
        try:
            exit_code, last_words = self._ray.get(hired.ended)
        except self._ray.exceptions.RayTaskError as error:
            exit_code, last_words = 1, str(error)
        except self._ray.exceptions.RayError as error:
            self._log(name, str(error))
            if "creation task" in str(error):
                return Gone(name, "exited with 1")
            return Gone(name, _cause(str(error)))
        self._log(name, last_words)
        return Gone(name, f"exited with {exit_code}")

    def _look_at_starts(self, now_s: float) -> None:
        by_place = {hired.place: name for name, hired in self._hired.items() if hired.place is not None}
        for place in self._ready(list(by_place)):
            name = by_place.pop(place)
            self._hired[name].place = None
            try:
                self._log(name, self._ray.get(place))
            except self._ray.exceptions.RayError:
                continue  # ``ended`` tells why
        if not by_place:
            self._told = False
            return
        late_s = {name: now_s - self._hired[name].since_s for name in by_place.values()}
        if max(late_s.values()) > _PENDING_S:
            self._see_to_late_starts(late_s)

    def _see_to_late_starts(self, late_s: dict[str, float]) -> None:
        """Without a free CPU a start waits for as long as it must. With one it hangs, perhaps on a dying node."""
        free, there = self._ray.available_resources(), self._ray.cluster_resources()
        for kind, needed in self._needs.items():
            if free.get(kind, 0) < needed:
                if not self._told:
                    self._told = True
                    names, total = ", ".join(late_s), there.get(kind, 0)
                    self._say(f"{names} must wait until the Ray cluster has a free {kind}; it has {total:g} in all")
                return
        for name in [name for name, seconds in late_s.items() if seconds > _START_S]:
            self.kill(name)

    def close(self) -> None:
        for hired in self._hired.values():
            self._ray.kill(hired.actor)
        self._hired.clear()
        if self._connected_here:
            self._connected_here = False
            self._ray.shutdown()

    def _log(self, name: str, text: str) -> None:
        assert self._folder is not None
        with self._folder.log_path(name).open("a") as log:
            log.write(f"{text}\n")


def imported_ray(what: str = "on='ray'") -> Any:
    """Ray. ``ConfigError`` if it is not installed: ``what`` needs it."""
    try:
        import ray
        import ray.util
    except ImportError:
        raise ConfigError(f"{what} needs Ray, which is not installed here: pip install 'shoal[ray]'") from None
    return ray


def _cause(text: str) -> str:
    """Why an actor has died, in Ray's words, which are many."""
    found = re.search(r"The actor (?:is dead|died) because (.+?)(?:\.|$)", text, re.MULTILINE)
    return found.group(1) if found else text.partition("\n")[0]


def _connect(ray: Any) -> bool:
    """Join the cluster, unless this process has; whether it was done here. Never starts one."""
    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "auto" and ("://" in address or not re.fullmatch(r"\S+:\d+", address)):
        raise ConfigError(
            f"RAY_ADDRESS must be HOST:PORT of a running cluster that this machine is of, or auto, not {address!r}"
        )
    if address != "auto" and unreachable({"head": address}, _ANSWER_S):
        raise ConfigError(f"no Ray cluster answers at {address} (RAY_ADDRESS); {_ADVICE}")
    errors: list[BaseException] = []
    joining = threading.Thread(target=_join, args=(ray, address, errors), daemon=True)
    joining.start()
    joining.join(_CONNECT_S)
    if joining.is_alive():
        raise ConfigError(f"the Ray cluster of {address} did not take us in within {_CONNECT_S:g} s; {_ADVICE}")
    if errors:
        raise _translated(ray, address, errors[0]) from errors[0]
    return True


_ADVICE = "start one with `ray start --head`, and run this on one of its machines, or set RAY_ADDRESS=HOST:PORT"


def _join(ray: Any, address: str, errors: list[BaseException]) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for it
        errors.append(error)


def _translated(ray: Any, address: str, error: BaseException) -> ConfigError:
    """Ray tells of a refused token in its log only, and raises what it raises for a dead cluster."""
    first_line = str(error).partition("\n")[0]
    if "Could not find any running Ray" in first_line:
        return ConfigError(f"there is no Ray cluster that this machine is of; {_ADVICE}")
    if isinstance(error, ConnectionError | ray.exceptions.AuthenticationError):
        return ConfigError(
            f"the Ray cluster of {address} did not admit us. If it wants a token, set RAY_AUTH_MODE=token, and "
            f"RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as on its machines; is it alive? Ray says: {first_line}"
        )
    return ConfigError(f"the Ray cluster of {address} cannot be joined: {first_line}")
