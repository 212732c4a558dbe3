"""Changing a job's fields by name, and telling what it resolves to and where each value came from."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from shoal.errors import ConfigError
from shoal.job.job import Job


def parse_settings(settings: Iterable[str]) -> dict[str, str]:
    """``["strategy.bucket_bytes=1024"]`` to a mapping."""
    parsed = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"a setting must read FIELD=VALUE, not {text!r}")
        parsed[name.strip()] = value.strip()
    return parsed


def override(job: Job, settings: Mapping[str, str]) -> Job:
    """The job with fields replaced by text values, such as ``global_batch=128`` or ``strategy.bucket_bytes=1024``.

    ``none`` unsets a field that may be empty. ``ConfigError`` for an unknown name (with the nearest one) or a value
    that is not of the field's type.
    """
    if {"epochs", "steps"} & set(settings) and len({"epochs", "steps"} & set(settings)) == 1:
        other = "steps" if "epochs" in settings else "epochs"
        settings = {**settings, other: "none"}
    tree: dict[str, Any] = {}
    for name, text in sorted(settings.items(), key=lambda setting: -setting[0].count(".")):
        node = tree
        *parents, last = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = text
    changed: Job = _replace(job, tree, "")
    return changed


def _replace(value: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(type(value))
    changes = {}
    for name, new in tree.items():
        full = f"{prefix}{name}"
        current = getattr(value, _known(name, full, [f.name for f in dataclasses.fields(value)]))
        if isinstance(new, Mapping):
            if not dataclasses.is_dataclass(current):
                raise ConfigError(f"{full} has no fields to set")
            changes[name] = _replace(current, new, f"{full}.")
        else:
            changes[name] = _parsed(full, new, hints[name])
    return dataclasses.replace(value, **changes)


def _known(name: str, full: str, names: Sequence[str]) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {full.removesuffix(name)}{near[0]}?" if near else f"; there are {', '.join(names)}"
    raise ConfigError(f"no field {full}{hint}")


def _parsed(name: str, text: str, hint: Any) -> Any:
    plain = list(typing.get_args(hint) or (hint,))
    if any(t not in (int, float, str, bool, type(None)) for t in plain if not isinstance(t, str)):
        raise ConfigError(f"{name} is not a number or a word; set it in the job file")
    given = None if text.lower() == "none" else text
    try:
        return msgspec.convert(given, hint, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}={text}: {error}") from error


def describe(job: Job, settings: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The job as JSON: each field's value, and under ``from`` where those came from that the file did not decide."""
    defaults = {
        f.name
        for f in dataclasses.fields(job)
        if (f.default is not dataclasses.MISSING and getattr(job, f.name) == f.default)
        or (f.default_factory is not dataclasses.MISSING and getattr(job, f.name) == f.default_factory())
    }
    described = {f.name: _plain(getattr(job, f.name)) for f in dataclasses.fields(job)}
    described["from"] = {
        **dict.fromkeys(sorted(defaults), "default"),
        **dict.fromkeys(sorted(settings or {}), "flag"),
    }
    return described


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if hasattr(value, "block_sizes"):
        return value.describe()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": type(value).__name__}
        return kind | {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__qualname__
