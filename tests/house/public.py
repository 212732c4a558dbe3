"""The public names of the project, as ``exports.txt`` lists them.

``python -m tests.house.public`` writes that file anew.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import shoal

GOLDEN = Path(__file__).with_name("exports.txt")


def public_names() -> list[str]:
    """What ``shoal`` and each of its packages say in ``__all__``."""
    names = [f"shoal.{name}" for name in shoal.__all__]
    for found in pkgutil.iter_modules(shoal.__path__, "shoal."):
        if found.ispkg:
            package = importlib.import_module(found.name)
            names += [f"{found.name}.{name}" for name in getattr(package, "__all__", ())]
    return sorted(names)


if __name__ == "__main__":
    GOLDEN.write_text("".join(f"{name}\n" for name in public_names()))
