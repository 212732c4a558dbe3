"""Plain JSON, for who has no client of a protocol: columns of samples by name, as nested lists, both ways.

``{"image": [[...], [...]]}`` is answered with ``{"scores": [[...], [...]], "best": [3, 7]}``: all inputs, all outputs.
Numbers are checked as those of the Open Inference Protocol are.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Raw

from shoal.errors import ConfigError
from shoal.job.task import TensorSpec
from shoal.serving.checks import require_alike, require_all, require_fit
from shoal.serving.codec import Question, output_of
from shoal.serving.datatypes import Array, Arrays, from_nested, to_nested
from shoal.serving.limits import Limits

_columns = msgspec.json.Decoder(dict[str, Raw])


def decode_columns(
    body: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], limits: Limits
) -> Question:
    """Read a request to a model with these inputs and outputs.

    ``ConfigError``, with what was needed and what came, for everything that the model must not see. Of a name that
    comes twice the last counts, as in other readers of JSON.
    """
    try:
        columns = _columns.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"the body must be an object in JSON, of arrays by the inputs' names: {error}") from error
    require_all(list(columns), [spec.name for spec in inputs])
    values = {spec.name: _column(bytes(columns[spec.name]), spec, limits) for spec in inputs}
    require_alike(values)
    return Question(inputs=values, outputs=tuple(spec.name for spec in outputs), as_bytes=frozenset(), id=None)


def _column(data: bytes, spec: TensorSpec, limits: Limits) -> Array:
    try:
        value = from_nested(data, spec.datatype, len(spec.shape))
        limits.check_samples(len(value))
        require_fit(spec.datatype, value.shape, spec)
    except ConfigError as error:
        raise type(error)(f"input {spec.name!r}: {error.message}") from error
    return value


def encode_columns(question: Question, outputs: Arrays) -> bytes:
    """The response's body. ``Bug`` if the model did not compute an output that it declares; ``ConfigError`` if JSON
    cannot carry what it did."""
    return msgspec.json.encode({name: _nested(name, output_of(outputs, name)) for name in question.outputs})


def _nested(name: str, array: Array) -> list[object]:
    try:
        return to_nested(array)
    except ConfigError as error:
        raise ConfigError(f"{name!r} in JSON: {error.message}") from error
