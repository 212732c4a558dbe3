"""From a run or a package to a folder that container builders take: a Dockerfile, and all that it copies."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from shoal.errors import ConfigError, Fault, StoreFault
from shoal.job import files_of
from shoal.launch.dockerfile import IGNORED, dockerfile
from shoal.launch.exporting import export, is_package, verified
from shoal.launch.pins import Pins, pins_of
from shoal.launch.using import folder_of
from shoal.serving.package import read

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's index of builds without CUDA: on Linux those of the default index are ten times as large."""

_ITSELF = Path(__file__).resolve().parents[1]
"""The package that runs here."""

_BASE = re.compile(r"[A-Za-z0-9][\w./:@-]*")
_URL = re.compile(r"""https?://[^\s@"'$\\]+""")


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """``base``: the image to start from; it must have Python, with ``venv``, as ``python3``. ``torch_index``: where
    torch is installed from; empty: from where all else is. ``wheel``: shoal itself; by default made from the source
    that runs, if that is a checkout, else had from the index by its version."""

    base: str = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim-bookworm"
    torch_index: str = TORCH_INDEX
    wheel: Path | None = None

    def __post_init__(self) -> None:
        if not _BASE.fullmatch(self.base):
            raise ConfigError(f"the base must be an image's name, such as {ImageOptions.base}, not {self.base!r}")
        if self.torch_index and not _URL.fullmatch(self.torch_index):
            raise ConfigError(
                f"torch's index must be a URL such as {TORCH_INDEX}, without user or password, not "
                f"{self.torch_index!r}; give credentials to the build, not to the Dockerfile"
            )
        if self.wheel and not (
            self.wheel.is_file() and self.wheel.name.startswith("shoal-") and self.wheel.suffix == ".whl"
        ):
            raise ConfigError(f"shoal's wheel is a file such as shoal-0.1.0-py3-none-any.whl, and {self.wheel} is none")


@dataclass(frozen=True)
class Context:
    """What was written: where, and the image's tag."""

    folder: Path
    tag: str


def write_context(
    target: str | Path,
    to: Path | None = None,
    *,
    version: int | None = None,
    job_file: Path | None = None,
    options: ImageOptions | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Context:
    """Write what an image that serves a run or a package is built from, whole or not at all.

    ``to``: the folder to make, by default NAME-VERSION-image in this one. ``version``: of a run. ``job_file``: of a
    package. What was written is asked the package's samples in a process of its own; ``ConfigError`` if it cannot
    serve, ``Fault`` if it answers otherwise than at the export. ``say`` is told how it goes.
    """
    options = options or ImageOptions()
    job_file = _job_file(target, version, job_file)
    _refuse_what_is_there(to)
    try:
        home = (to or Path("image")).absolute().parent
        home.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".image-", dir=home) as spare:
            built = Path(spare) / "image"
            built.mkdir()
            told = _write_model(target, built / "model", version, job_file, say)
            pins = _write_app(job_file, built / "app")
            _write_rest(built, told, job_file.name, pins, options, say)
            say("asking what was written for the answers of the export")
            _check(built, job_file.name)
            _make_readable(built)
            folder = to or Path(f"{told['name']}-{told['version']}-image")
            _refuse_what_is_there(folder)
            built.rename(folder)
    except OSError as error:
        raise StoreFault(f"the image's folder could not be written: {error}") from error
    return Context(folder, f"{_repository(told['name'])}:{told['version']}")


def _job_file(target: str | Path, version: int | None, job_file: Path | None) -> Path:
    if is_package(Path(target)):
        if version is not None:
            raise ConfigError(f"{target} is a package, of one version: leave --version out")
        if job_file is None:
            raise ConfigError(f"{target} holds no code: give the job file of its task with --job")
        if not job_file.is_file():
            raise ConfigError(f"a job file is needed, and {job_file} does not exist")
        return job_file
    if job_file is not None:
        raise ConfigError(f"--job is for packages, and {target} is none: a run knows its job")
    recorded = folder_of(target).read_record()["job_file"]
    if recorded is None:
        raise ConfigError(f"{target} was started from Python, and an image needs the file of its job")
    return Path(recorded)


def _refuse_what_is_there(folder: Path | None) -> None:
    if folder and folder.exists():
        raise ConfigError(f"{folder} is there already; name another folder with --to, or remove it")


def _write_model(
    target: str | Path, place: Path, version: int | None, job_file: Path, say: Callable[[str], object]
) -> dict[str, Any]:
    """The package, and what ``verified`` tells of it. The job's code is loaded with that."""
    if is_package(Path(target)):
        say(f"checking {target}")
        read(Path(target))
        shutil.copytree(target, place, symlinks=True)
    else:
        say(f"exporting {target}")
        export(target, place, version=version)
    return verified(place, job_file)


def _write_app(job_file: Path, place: Path) -> Pins:
    """The files whose revision counts, as they lie in the job file's folder."""
    folder, code = job_file.resolve().parent, files_of(job_file)
    for path in code:
        copy = place / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return pins_of(code, folder)


def _write_rest(
    folder: Path, told: dict[str, Any], job_name: str, pins: Pins, options: ImageOptions, say: Callable[[str], object]
) -> None:
    wheel = _wheel(folder, options.wheel, say)
    itself = f"./{wheel}[serve]" if wheel else f"shoal[serve]=={pins.shoal}"
    requirements = [itself, *(f"{name}=={version}" for name, version in pins.imported.items())]
    constraints = [f"{name}=={version}" for name, version in pins.all.items()]
    texts = {
        "requirements.txt": "".join(f"{line}\n" for line in requirements),
        "constraints.txt": "".join(f"{line}\n" for line in constraints),
        "Dockerfile": dockerfile(
            about=told, base=options.base, torch=pins.all["torch"], torch_index=options.torch_index,
            copied=["requirements.txt", "constraints.txt", *([wheel] if wheel else [])], job_name=job_name,
        ),
        ".dockerignore": IGNORED,
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)


def _wheel(folder: Path, given: Path | None, say: Callable[[str], object]) -> str | None:
    """The name of shoal's wheel in the folder; none if the index has the shoal that runs here."""
    source = _ITSELF.parents[1]
    if given:
        shutil.copyfile(given, folder / given.name)
    elif _ITSELF.parent.name == "src" and (source / "pyproject.toml").is_file():
        say(f"making a wheel of the shoal in {source}")
        _build_wheel(source, folder)
    elif distribution("shoal").read_text("direct_url.json"):
        raise ConfigError("the shoal that runs here was not installed from an index: give its wheel with --wheel")
    return next((path.name for path in folder.glob("*.whl")), None)


def _build_wheel(source: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    if importlib.util.find_spec("hatchling"):
        command.insert(-1, "--no-build-isolation")
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise ConfigError(f"no wheel can be made of {source}: {_last(built.stderr)}; give one with --wheel")


def _check(folder: Path, job_name: str) -> None:
    """Have a process that knows the context only answer as the export did."""
    script = "from shoal.cli import main; main()"
    command = [sys.executable, "-P", "-c", script, "verify", str(folder / "model"), "--job", job_name]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, cwd=folder / "app", env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode:
        kind = ConfigError if done.returncode == ConfigError.exit_code else Fault
        raise kind(f"what would be in the image cannot serve: {_last(done.stderr)}")


def _last(output: str) -> str:
    return (output.strip().splitlines() or ["it does not say why"])[-1].removeprefix("error: ")


def _make_readable(folder: Path) -> None:
    """By the image's user, who is not who made these files."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644, follow_symlinks=not path.is_symlink())


def _repository(name: str) -> str:
    """A name as tags may have it."""
    plain = re.sub(r"[^a-z0-9]+", lambda found: "_" if found[0] == "_" else "-", name.lower())
    return plain.strip("-_") or "model"
