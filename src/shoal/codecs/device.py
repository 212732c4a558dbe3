"""Which of the two implementations of a loop runs: the compiled one on a CPU, the one in torch elsewhere."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from shoal.codecs import plain


def run(name: str, *arguments: Any) -> None:
    """Call the loop of that name. The first argument's device decides, if it is a tensor and not an array."""
    if isinstance(arguments[0], Tensor) and arguments[0].device.type != "cpu":
        getattr(plain, name)(*arguments)
    else:
        getattr(compiled(), name)(*(a.numpy() if isinstance(a, Tensor) else a for a in arguments))


@cache
def compiled() -> ModuleType:
    """The compiled loops. The first call takes half a second."""
    return import_module("shoal.codecs.kernels")


@cache
def compiled_rows() -> ModuleType:
    """Those over many rows at once."""
    return import_module("shoal.codecs.row_kernels")
