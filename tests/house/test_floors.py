"""Imports go down only, and few may touch what is heavy or foreign. The one place where the floors are written down."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.house.reading import Module, parse

FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors clock events compiling",
        "lanes codecs optim metrics lab rollout",
        "membership",
        "comm tables",
        "strategies sources features versions shards",
        "job",
        "evaluation planning",
        "training serving",
        "service",
        "launch",
        "cli dashboard",
    )
)
"""From the ground up. A package imports from floors below its own, never from its own or above."""

BESIDE = "testing"
"""Fakes and laws for tests: sees what a floor below ``launch`` sees, and nothing in the package imports it."""

ONLY_IN = {
    "torch.distributed": "shoal.comm",
    "zmq": "shoal.comm",
    "ray": "shoal.launch.ray shoal.launch.ray_serve",
    "starlette": "shoal.serving",
    "httptools": "shoal.serving",
    "grpc": "shoal.serving",
    "google": "shoal.serving",
    "flask": "shoal.serving",
    "click": "shoal.cli",
    "mlflow": "shoal.serving.mlflow_model",
    "model_signing": "shoal.serving.signing",
    "onnxruntime": "shoal.serving.graph",
}
"""What only one part of the package may import."""

NEVER = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
"""Nothing executable crosses a wire or a disk."""

WITHOUT_TORCH = {"errors", "clock", "events", "lanes", "membership", "lab", "rollout"}
PURE = {"lanes", "membership", "rollout"}
OUTSIDE_WORLD = {"asyncio", "os", "pathlib", "random", "socket", "subprocess", "sys", "threading", "time"}


def floor(package: str) -> int:
    if package == BESIDE:
        return floor("launch")
    return next((level for level, packages in enumerate(FLOORS) if package in packages), -1)


def imports(module: Module) -> Iterator[str]:
    """Every module that this one names in an import, anywhere in its text."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def climbs(module: Module) -> list[str]:
    """The imports by which a module leaves its place."""
    found = []
    for name in imports(module):
        if not is_within(name, "shoal") or module.name == "shoal":
            continue
        other = name.split(".")[1]
        goes_down = floor(other) < floor(module.package) and other != BESIDE
        if other != module.package and not goes_down:
            found.append(f"{module.path} imports {name}")
    return found


def test_every_package_has_a_floor(package_modules: Sequence[Module]) -> None:
    homeless = {m.package for m in package_modules if m.package and floor(m.package) < 0}
    assert not homeless, f"give {sorted(homeless)} a floor in {Path(__file__).name}, or move them"


def test_imports_go_down_only(package_modules: Sequence[Module]) -> None:
    assert not [climb for module in package_modules for climb in climbs(module)]


def test_an_import_inside_a_function_counts() -> None:
    text = "def run():\n    from shoal.training import worker\n"
    assert climbs(parse(Path("src/shoal/comm/link.py"), text)) == [
        "src/shoal/comm/link.py imports shoal.training.worker"
    ]


def test_siblings_do_not_import_each_other() -> None:
    module = parse(Path("src/shoal/sources/parquet.py"), "import shoal.versions.store")
    assert climbs(module) == ["src/shoal/sources/parquet.py imports shoal.versions.store"]


def test_what_is_foreign_is_imported_in_one_place_only(package_modules: Sequence[Module]) -> None:
    for foreign, home in ONLY_IN.items():
        users = {m.name for m in package_modules if any(is_within(name, foreign) for name in imports(m))}
        strangers = {user for user in users if not any(is_within(user, one) for one in home.split())}
        assert not strangers, f"only {home} imports {foreign}, and so do {sorted(strangers)}"


def test_nothing_imports_a_way_to_run_what_was_received(package_modules: Sequence[Module]) -> None:
    found = [(m.name, name) for m in package_modules for name in imports(m) if name.split(".")[0] in NEVER]
    assert not found


def test_the_lower_floors_do_without_torch(package_modules: Sequence[Module]) -> None:
    lower = [m for m in package_modules if m.package in WITHOUT_TORCH]
    assert not [m.name for m in lower if any(is_within(name, "torch") for name in imports(m))]


def test_what_decides_touches_neither_time_nor_the_world(package_modules: Sequence[Module]) -> None:
    pure = [m for m in package_modules if m.package in PURE]
    assert not [(m.name, n) for m in pure for n in imports(m) if n.split(".")[0] in OUTSIDE_WORLD]


def test_importing_shoal_starts_nothing_and_loads_no_engine() -> None:
    script = (
        "import os, sys, threading, torch\n"
        "threads, folder = threading.active_count(), set(os.listdir())\n"
        "import shoal\n"
        "assert threading.active_count() == threads\n"
        "assert set(os.listdir()) == folder\n"
        "engines = {'ray', 'starlette', 'grpc', 'flask', 'httptools', 'httpx', 's3fs', 'sklearn', 'mlflow', 'pyspark', "
        "'onnx', 'sigstore', 'opentelemetry'}\n"
        "print(sorted(engines & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_a_run_without_tables_and_codecs_loads_no_compiler() -> None:
    script = (
        "import sys, shoal.launch.rehearsal, shoal.launch.using, shoal.launch.driver, shoal.training.worker\n"
        "print('numba' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "False"
