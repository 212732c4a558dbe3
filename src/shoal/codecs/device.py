"""Which of the two implementations of a loop runs: the compiled one on a CPU, the one in torch elsewhere."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from shoal.codecs import plain


def run(name: str, *arguments: Any) -> None:
    """Call the loop of that name; the first argument is a tensor, whose device decides."""
    kernels = compiled() if arguments[0].device.type == "cpu" else None
    if kernels is None:
        getattr(plain, name)(*arguments)
    else:
        getattr(kernels, name)(*(a.numpy() if isinstance(a, Tensor) else a for a in arguments))


def compiled() -> ModuleType | None:
    """The compiled loops. The first call takes half a second."""
    return import_module("shoal.codecs.kernels")
