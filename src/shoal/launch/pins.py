"""Which versions an image is to have: those that are installed here, of what serving needs and what a job imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from shoal.errors import ConfigError

_SHOAL, _SERVE = "shoal", "serve"
_NAME = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[([^\]]*)\])?")
_OF_EXTRA = re.compile(r"""extra\s*==\s*["']([\w.-]+)["']""")


@dataclass(frozen=True)
class Pins:
    """``shoal``: its version here. ``imported``: what the job's code imports beyond what serving needs. ``all``: these,
    and all that they and serving need; without shoal. Versions by name, without local labels such as ``+cpu``."""

    shoal: str
    imported: dict[str, str]
    all: dict[str, str]


def pins_of(code: Sequence[Path], folder: Path) -> Pins:
    """Those of a job: ``code`` are its files, in ``folder``. ``ConfigError`` if what serving needs is not installed, or
    if the job imports something that came from no index."""
    needed = _all_of([(_SHOAL, ""), (_SHOAL, _SERVE)])
    for name, _ in _requirements(distribution(_SHOAL), _SERVE):
        if name not in needed:
            raise ConfigError(
                f"an image has the versions that are installed here, and {name} is not: pip install 'shoal[serve]'"
            )
    imported = {name: _from_an_index(name) for name in sorted(_imported(code, folder) - needed.keys())}
    every = needed | _all_of((name, "") for name in imported)
    shoal = every.pop(_SHOAL)
    return Pins(shoal, imported, dict(sorted(every.items())))


def _all_of(wanted: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What is installed of some packages, each with one extra or none, and of all that they need. Other markers are
    not looked at: to pin what another machine does without does no harm."""
    found: dict[str, str] = {}
    todo, seen = list(wanted), set[tuple[str, str]]()
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        try:
            package = distribution(item[0])
        except PackageNotFoundError:
            continue
        found[item[0]] = _version(package)
        todo += _requirements(package, item[1])
    return found


def _requirements(package: Distribution, extra: str) -> Iterator[tuple[str, str]]:
    """What a package needs with an extra only, or without any: names, and with each of their extras."""
    for text in package.requires or ():
        requirement, _, marker = text.partition(";")
        extras = _OF_EXTRA.findall(marker)
        match = _NAME.match(requirement)
        if match and (extra in extras if extras else not extra):
            name = _normal(match[1])
            yield name, ""
            yield from ((name, wanted.strip()) for wanted in (match[2] or "").split(",") if wanted.strip())


def _imported(code: Sequence[Path], folder: Path) -> set[str]:
    """The installed packages that some files import, but for what lies beside them."""
    own = {path.relative_to(folder).parts[0].removesuffix(".py") for path in code} | {_SHOAL}
    names = {name for path in code for name in _imports(path)} - own
    homes = packages_distributions()
    return {_normal(package) for name in names for package in homes.get(name, ())}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _from_an_index(name: str) -> str:
    package = distribution(name)
    if package.read_text("direct_url.json"):
        raise ConfigError(
            f"the job imports {name}, which was not installed from an index but from a file or a repository, where an "
            "image cannot have it from; put its code into the folder of the job file"
        )
    return _version(package)


def _version(package: Distribution) -> str:
    return package.version.partition("+")[0]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
