"""Every error there is can be carried from one process to another, whole."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.errors import Bug, ConfigError, Fault, ShoalError
from shoal.launch.run import Run, Stopped

SAMPLES: dict[type, Any] = {
    str: "what was needed, what came, what to do",
    int: 3,
    float: 0.5,
    bool: True,
    Run: Run(Path("runs/example"), "stopped", "Ctrl-C"),
}
NOBODYS = {ShoalError, Stopped}
"""The root, and what a person did on purpose."""


def error_classes() -> list[type[ShoalError]]:
    """The root and everything below it, in every module that can be imported here."""
    for module in pkgutil.walk_packages(shoal.__path__, "shoal."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("shoal"):
                    raise
    return sorted({ShoalError, *below(ShoalError)}, key=lambda kind: kind.__qualname__)


def below(kind: type[ShoalError]) -> Iterator[type[ShoalError]]:
    for child in kind.__subclasses__():
        if child.__module__.startswith("shoal."):
            yield child
        yield from below(child)


def sample(hint: Any) -> Any:
    """A value of the type, never the empty one."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if kinds[0] in SAMPLES:
        return SAMPLES[kinds[0]]
    raise AssertionError(f"say in {__file__} what a sample of {hint} is")


def make(kind: type[ShoalError]) -> ShoalError:
    hints = typing.get_type_hints(kind.__init__)
    names = [name for name in inspect.signature(kind).parameters if name in hints]
    return kind(**{name: sample(hints[name]) for name in names})


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__qualname__)
def test_an_error_survives_pickling_with_all_it_carries(kind: type[ShoalError]) -> None:
    error = make(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert str(copy) == str(error) == error.message


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__qualname__)
def test_an_error_says_who_must_act(kind: type[ShoalError]) -> None:
    families = [family for family in (ConfigError, Fault, Bug) if issubclass(kind, family)]
    assert len(families) == (0 if kind in NOBODYS else 1)
    assert kind.__doc__
    assert kind.exit_code in (1, 2)
