"""From a Python file to its job."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from shoal.errors import ConfigError, ShoalError
from shoal.job.job import Job

_MODULE = "shoal_job"


def load_job(path: Path) -> Job:
    """Run the file under the module name ``shoal_job`` and return the ``Job`` that it defines.

    The file's folder can be imported from. ``ConfigError`` if the file is missing, does not import (with the line), or
    defines no job or several without one named ``job``.
    """
    if not path.is_file():
        raise ConfigError(f"a job file is needed, and {path} does not exist")
    module = _run(path.resolve())
    jobs = {name: value for name, value in vars(module).items() if isinstance(value, Job)}
    if "job" in jobs:
        return jobs["job"]
    if len(jobs) == 1:
        return next(iter(jobs.values()))
    found = f"it defines {', '.join(sorted(jobs))}" if jobs else "it defines none"
    raise ConfigError(f"{path} must define one shoal.Job named job; {found}")


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ShoalError as error:
        raise ConfigError(f"{path}:{_line(error, path)}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{path}:{_line(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _line(error: Exception, path: Path) -> int:
    if isinstance(error, SyntaxError) and error.lineno:
        return error.lineno
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    return lines[-1] or 0 if lines else 0
