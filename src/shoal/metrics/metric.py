"""What a metric is, and how one made of additive parts merges and is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar, Protocol, Self, TypeVar, get_type_hints, runtime_checkable

from shoal.errors import ConfigError

Value = float | dict[str, Any]


@runtime_checkable
class Metric(Protocol):
    """A figure over samples, held as sums that add up exactly.

    However the samples are dealt out and in whatever order the parts are merged, the merged metric is the same value,
    bit for bit. A metric over no samples merges like any other; its ``value`` raises ``ConfigError``.
    """

    def merge(self, other: Self) -> Self:
        """The metric over both sets of samples. ``ConfigError`` if ``other`` is another metric or has other options."""
        ...

    def value(self) -> Value:
        """The figure, or a dict of plain values where one number cannot say it."""
        ...

    def to_state(self) -> dict[str, Any]:
        """Everything the metric holds, exactly, in values that JSON and msgpack can carry. See ``from_state``."""
        ...


class Part(Protocol):
    """A sum inside a metric: exact, so adding is associative and commutative bit for bit."""

    def __add__(self, other: Self, /) -> Self: ...

    def to_state(self) -> Any: ...

    @classmethod
    def from_state(cls, state: Any) -> Self: ...


class Additive(Protocol):
    """A frozen dataclass of parts and of options; a field with a default is an option."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


M = TypeVar("M", bound=Additive)


def merge_parts(one: M, other: M) -> M:
    """Add the sums of two metrics, whose options must agree."""
    if type(other) is not type(one):
        raise ConfigError(f"{type(one).__name__} merges with another {type(one).__name__}, not {type(other).__name__}")
    merged = {}
    for entry in fields(one):
        mine, theirs = getattr(one, entry.name), getattr(other, entry.name)
        is_option = entry.default is not MISSING
        if is_option and mine != theirs:
            raise ConfigError(
                f"{type(one).__name__} merges only with the same {entry.name}: {mine!r} and {theirs!r} came"
            )
        merged[entry.name] = mine if is_option else mine + theirs
    return type(one)(**merged)


def parts_to_state(metric: Additive) -> dict[str, Any]:
    """The metric's name and its fields, in plain values."""
    held = {entry.name: getattr(metric, entry.name) for entry in fields(metric)}
    plain = {name: part if isinstance(part, int | str) else part.to_state() for name, part in held.items()}
    return {"metric": type(metric).__name__, **plain}


def parts_from_state(kind: type[M], state: Mapping[str, Any]) -> M:
    """Undo ``parts_to_state``. ``ConfigError`` if a field is missing, unknown or of another kind."""
    names = {entry.name for entry in fields(kind)}
    if set(state) != names | {"metric"}:
        raise ConfigError(
            f"a state of {kind.__name__} has the fields {sorted(names)}, not {sorted(set(state) - {'metric'})}"
        )
    kinds = get_type_hints(kind)
    try:
        return kind(**{name: _restore(kinds[name], state[name]) for name in names})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"a state of {kind.__name__} cannot be read back: {error}") from error


def _restore(kind: Any, plain: Any) -> Any:
    if hasattr(kind, "from_state"):
        return kind.from_state(plain)
    if kind is int and type(plain) is not int:
        raise TypeError(f"a whole number was needed, and {plain!r} came")
    return plain


def require_samples(count: int, name: str) -> None:
    """Refuse to make a figure of nothing."""
    if count == 0:
        raise ConfigError(f"{name} needs at least one sample, and none came: evaluate on a source that has some")
