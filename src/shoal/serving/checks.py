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
    require_known("input", came, needed)
    if len(came) < len(needed):
        missing = sorted(set(needed) - set(came))
        raise ConfigError(f"the model needs the inputs {', '.join(needed)}; {', '.join(missing)} did not come")


def require_fit(datatype: str, shape: Sequence[int], spec: TensorSpec) -> None:
    """A datatype and a shape that are the model's."""
    if datatype != spec.datatype:
        raise ConfigError(f"datatype must be {spec.datatype}, not {datatype}")
    if len(shape) != len(spec.shape) or any(c < 1 or n not in (-1, c) for c, n in zip(shape, spec.shape, strict=True)):
        raise ConfigError(f"shape must be {list(spec.shape)}, where -1 is any number from 1, not {list(shape)}")


def require_alike(values: Arrays) -> None:
    """As many samples in each input."""
    if len(values) > 1 and len({value.shape[0] for value in values.values()}) > 1:
        counts = ", ".join(f"{name} has {len(value)}" for name, value in values.items())
        raise ConfigError(f"all inputs must count as many samples, first in their shapes: {counts}")
