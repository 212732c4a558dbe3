"""Images built and run without a daemon or a registry, in a store of their own that is gone afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("buildah", "debootstrap", "podman", "runc")
PODMAN = ("podman", "--runtime", "runc", "--cgroup-manager=cgroupfs", "--events-backend=file")
LIMITS = ("--ulimit", "nofile=1024:20000", "--ulimit", "nproc=4096:4096")
"""Within what a container may ask for that is itself in one."""


def why_not() -> str:
    """Why images cannot or shall not be built here; empty if they can."""
    if not os.environ.get("SHOAL_TEST_IMAGES"):
        return "to build an image takes minutes and gigabytes: SHOAL_TEST_IMAGES=1 has it done"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"needs {', '.join(missing)}"
    return "needs root" if os.geteuid() else ""


@dataclass(frozen=True)
class Store:
    """Where images and containers are. ``folder`` holds all of it."""

    folder: Path

    def run(self, *command: object, stdin: str = "") -> str:
        """What a command prints. ``AssertionError`` with all that it said if it fails."""
        words, environment = [str(word) for word in command], os.environ | {"CONTAINERS_STORAGE_CONF": self._conf}
        done = subprocess.run(
            words, env=environment, input=stdin, capture_output=True, text=True, timeout=900, check=False
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    @property
    def _conf(self) -> str:
        path = self.folder / "storage.conf"
        if not path.exists():
            graph, run = self.folder / "graph", self.folder / "run"
            path.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{graph}"\nrunroot = "{run}"\n')
        return str(path)

    def base(self, name: str) -> None:
        """Make an image of Debian with Python, and nothing else."""
        root = self.folder / "root"
        packages = "--include=python3,python3-venv,ca-certificates"
        self.run("debootstrap", "--variant=minbase", packages, "bookworm", root)
        container = self.run("buildah", "from", "scratch")
        self.run("buildah", "add", "--quiet", container, root, "/")
        self.run("buildah", "commit", "--quiet", container, name)
        self.run("buildah", "rm", container)
        shutil.rmtree(root)

    def build(self, folder: Path, tag: str, settings: Mapping[str, str]) -> None:
        """``settings``: pip's; what of them is a path is mounted beside what the image has."""
        words: list[object] = []
        for number, (name, value) in enumerate(settings.items()):
            inside = f"/mnt/{number}" if value.startswith("/") else value
            words += ["--volume", f"{value}:{inside}:ro"] if value.startswith("/") else []
            words += ["--build-arg", f"PIP_{name.upper().replace('-', '_')}={inside}"]
        how = ("--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker")
        self.run("buildah", "build", *how, *words, "--tag", tag, folder)

    def podman(self, *words: object, stdin: str = "") -> str:
        return self.run(*PODMAN, *words, stdin=stdin)

    def size_bytes(self, tag: str) -> int:
        return int(json.loads(self.podman("image", "inspect", tag))[0]["Size"])


@contextmanager
def store(folder: Path) -> Iterator[Store]:
    """A store in a folder, until the context ends; so do its containers."""
    held = Store(folder)
    try:
        yield held
    finally:
        held.podman("rm", "--all", "--force")
        held.run("buildah", "rm", "--all")
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Container:
    """One that runs, cut off from every network but its own loopback."""

    store: Store
    id: str

    def exec(self, *words: object, stdin: str = "") -> str:
        return self.store.podman("exec", "--interactive", self.id, *words, stdin=stdin)

    def until_healthy(self, patience_s: float = 120.0) -> float:
        """Seconds until the image's own check of health was content."""
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < patience_s and self._runs():
            if self._tried("healthcheck", "run")[0] == 0:
                return time.monotonic() - begun_s
        raise AssertionError(self._tried("logs")[1])

    def _runs(self) -> bool:
        return "true" in self._tried("inspect", "--format", "{{.State.Running}}")[1]

    def _tried(self, *words: str) -> tuple[int, str]:
        """The exit code, and all that was said."""
        environment = os.environ | {"CONTAINERS_STORAGE_CONF": str(self.store.folder / "storage.conf")}
        done = subprocess.run(
            [*PODMAN, *words, self.id], env=environment, text=True, check=False, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout

    @property
    def exit_code(self) -> int:
        return int(self.store.podman("inspect", "--format", "{{.State.ExitCode}}", self.id))


def start(held: Store, tag: str, *words: str) -> Container:
    """A container of an image, as strictly as it can be had."""
    strict = ("--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL", "--network", "none")
    name = held.podman("create", *strict, "--security-opt", "no-new-privileges", *LIMITS, *words, tag)
    held.podman("start", name)
    return Container(held, name)


def pip_settings(names: Sequence[str] = ("index-url", "find-links", "cert")) -> dict[str, str]:
    """Pip's on this machine, as far as there are any: a build has them from nowhere else."""
    found = {}
    for name in names:
        asked = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", f"global.{name}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        value = os.environ.get(f"PIP_{name.upper().replace('-', '_')}") or asked.stdout.strip()
        found |= {name: value} if value else {}
    return found
