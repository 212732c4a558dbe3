"""What the inputs of a request must be before the model sees them, in whatever form they came.

Each of these raises ``ConfigError`` with what was needed and what came.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from shoal.errors import ConfigError
from shoal.job.task import TensorSpec
from shoal.serving.datatypes import Arrays


def require_known(kind: str, came: Sequence[str], known: Collection[str]) -> None:
    """Names of inputs or outputs that the model has, each once."""
    for name in came:
        if name not in known:
            raise ConfigError(f"the model has no {kind} {name!r}: it has {', '.join(known)}")
    if len(set(came)) < len(came):
        raise ConfigError(f"each {kind} is named once, and these came: {', '.join(came)}")


def require_all(came: Sequence[str], needed: Collection[str]) -> None:
    """All inputs, each once."""
    if came == list(needed):  # as most do
        return
    require_known("input", came, needed)
    if len(came) < len(needed):
        missing = sorted(set(needed) - set(came))
        raise ConfigError(f"the model needs the inputs {', '.join(needed)}; {', '.join(missing)} did not come")


def require_fit(datatype: str, shape: Sequence[int], spec: TensorSpec) -> None:
    """A datatype and a shape that are the model's."""
    if datatype != spec.datatype:
        raise ConfigError(f"datatype must be {spec.datatype}, not {datatype}")
    if not _fits(shape, spec.shape):
        raise ConfigError(f"shape must be {list(spec.shape)}, where -1 is any number from 1, not {list(shape)}")


def _fits(shape: Sequence[int], needed: Sequence[int]) -> bool:
    if len(shape) != len(needed):
        return False
    for came, size in zip(shape, needed, strict=True):  # noqa: SIM110 - a generator would take twice as long
        if came < 1 or size not in (-1, came):
            return False
    return True


def require_alike(values: Arrays) -> None:
    """As many samples in each input."""
    if len(values) > 1 and len(set(map(len, values.values()))) > 1:
        counts = ", ".join(f"{name} has {len(value)}" for name, value in values.items())
        raise ConfigError(f"all inputs must count as many samples, first in their shapes: {counts}")
