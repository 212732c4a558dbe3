"""The Open Inference Protocol's datatypes: in JSON and in bytes as NumPy's arrays, and in a model as torch's tensors.

A server's front has to do with arrays alone: to make one costs a fraction of what a tensor does, and so does whatever
is done with it, which tells where there are thousands in a second. NumPy has no bfloat16; ``ml_dtypes`` has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.errors import ConfigError
from shoal.job.task import TensorSpec

Buffer = bytes | memoryview | msgspec.Raw
Array = NDArray[Any]
Arrays = Mapping[str, Array]
Tensors = Mapping[str, Tensor]

DTYPES = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
"""All but ``BYTES``, which no torch tensor holds."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ARRAY_DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(ml_dtypes.bfloat16) if name == "BF16" else torch.empty(0, dtype=dtype).numpy().dtype
    for name, dtype in DTYPES.items()
}
_ARRAY_NAMES = {dtype: name for name, dtype in ARRAY_DTYPES.items()}

_NARROW = frozenset({"FP16", "BF16", "FP32"})
"""Into which a number of JSON may not fit: it is infinite then, and refused as that."""
WHOLE = frozenset("biu")
"""Of dtypes, the kinds that have no NaN."""


def datatype_of(dtype: torch.dtype) -> str:
    """The protocol's name of a dtype. ``ConfigError`` if it has none."""
    if dtype not in _NAMES:
        known = ", ".join(str(d).removeprefix("torch.") for d in _NAMES)
        raise ConfigError(f"a served tensor's dtype must be one of {known}, not {str(dtype).removeprefix('torch.')}")
    return _NAMES[dtype]


def refuse_without_numpy(specs: Sequence[TensorSpec]) -> None:
    """``ConfigError`` for a tensor of a datatype that NumPy lacks, and so does what is asked by NumPy arrays."""
    for spec in specs:
        if spec.datatype == "BF16":
            raise ConfigError(f"{spec.name} is BF16, which NumPy has no type for; have the task take and give FP32")


def datatype_of_array(array: Array) -> str:
    """The protocol's name of an array's dtype. ``ConfigError`` if it has none."""
    name = _ARRAY_NAMES.get(array.dtype)
    if name is None:
        raise ConfigError(f"a served array's dtype must be one of {', '.join(_NAMES.values())}, not {array.dtype}")
    return name


def as_arrays(tensors: Tensors) -> dict[str, Array]:
    """The same, in the memory of tensors that are on the CPU. ``ConfigError`` for a dtype without a name."""
    return {name: _as_array(tensor.detach().cpu()) for name, tensor in tensors.items()}


def _as_array(tensor: Tensor) -> Array:
    datatype_of(tensor.dtype)
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def as_tensors(arrays: Arrays) -> dict[str, Tensor]:
    """The same, in the arrays' memory."""
    return {name: _as_tensor(array) for name, array in arrays.items()}


def _as_tensor(array: Array) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_json(data: Buffer, datatype: str, shape: Sequence[int]) -> Array:
    """An array of ``shape`` from a JSON array, flat in row-major order or nested as the shape is.

    ``ConfigError`` if the elements are of another kind or count, do not fit into the datatype, or are not finite.
    """
    try:
        values: list[Any] = _decoder(datatype, 1).decode(data)
    except msgspec.ValidationError:  # nested, or wrong
        return _from_nested_json(data, datatype, shape)
    require_count(len(values), shape)
    return _finite(_packed(values, datatype).reshape(shape))


def _from_nested_json(data: Buffer, datatype: str, shape: Sequence[int]) -> Array:
    depth = _depth(data)
    if depth not in (1, len(shape)):
        raise ConfigError(f"data must be an array, flat or nested {len(shape)} deep, and it is nested {depth} deep")
    array = _array(data, datatype, depth)
    if array.shape != tuple(shape):
        raise ConfigError(f"data nested as {list(shape)} was needed, and it is nested as {list(array.shape)}")
    return _finite(array)


def from_nested(data: bytes, datatype: str, num_axes: int) -> Array:
    """An array from a JSON array, nested as deep as the array has axes. ``ConfigError`` as in ``from_json``."""
    depth = _depth(data)
    if depth != num_axes:
        raise ConfigError(f"an array nested {num_axes} deep was needed, and it is nested {depth} deep")
    return _finite(_array(data, datatype, depth))


def from_values(values: Sequence[Any], datatype: str, shape: Sequence[int]) -> Array:
    """An array of ``shape`` from numbers in row-major order. ``ConfigError`` as in ``from_json``."""
    require_count(len(values), shape)
    return _finite(_packed(list(values), datatype).reshape(tuple(shape)))


def from_bytes(data: memoryview, datatype: str, shape: Sequence[int]) -> Array:
    """An array of ``shape`` from its row-major little-endian bytes. ``ConfigError`` as in ``from_json``."""
    dtype = ARRAY_DTYPES[datatype]
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise ConfigError(f"{datatype} of shape {list(shape)} takes {needed} bytes, and {len(data)} came")
    if datatype == "BOOL":
        found: Array = np.frombuffer(data, np.uint8).reshape(tuple(shape)) != 0
        return found
    return _finite(np.frombuffer(bytearray(data), dtype).reshape(tuple(shape)))


def to_json(array: Array) -> list[Any]:
    """Flat values in row-major order. ``ConfigError`` if one is not finite, which JSON cannot say."""
    flat = to_values(array)
    if array.dtype.kind not in WHOLE and not math.isfinite(sum(flat)):  # numbers may be finite, and their sum be not
        _finite(array)
    return flat


def to_values(array: Array) -> list[Any]:
    """Flat values in row-major order, be they finite or not."""
    values: list[Any] = _sayable(array).reshape(-1).tolist()
    return values


def to_nested(array: Array) -> list[Any]:
    """Values nested as the shape is. ``ConfigError`` as in ``to_json``."""
    nested: list[Any] = _sayable(_finite(array)).tolist()
    return nested


def to_bytes(array: Array) -> bytes:
    """Row-major little-endian bytes."""
    return array.tobytes()


def _sayable(array: Array) -> Array:
    """As Python's own numbers."""
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def require_count(count: int, shape: Sequence[int]) -> None:
    """Refuse data that do not fill the shape."""
    if count != math.prod(shape):
        raise ConfigError(f"shape {list(shape)} takes {math.prod(shape)} values, and {count} came")


def _depth(data: Buffer) -> int:
    depth = 0
    for byte in memoryview(data):
        if byte == ord("["):
            depth += 1
        elif byte not in b" \t\r\n":
            break
    return depth


def _array(data: Buffer, datatype: str, depth: int) -> Array:
    try:
        values = _decoder(datatype, depth).decode(data)
    except msgspec.ValidationError as error:
        raise ConfigError(f"data must be {datatype} values: {error}") from error
    return _packed(values, datatype)


def _packed(values: list[Any], datatype: str) -> Array:
    if datatype == "UINT8" and values and type(values[0]) is int:  # as NumPy does, and three times as fast
        try:
            return np.frombuffer(bytearray(values), np.uint8)
        except ValueError as error:
            raise ConfigError(f"data must fit into UINT8: {error}") from error
    try:
        if datatype not in _NARROW:
            return np.array(values, ARRAY_DTYPES[datatype])
        with np.errstate(over="ignore"):
            return np.array(values, ARRAY_DTYPES[datatype])
    except OverflowError as error:
        raise ConfigError(f"data must fit into {datatype}: {error}") from error
    except ValueError as error:
        raise ConfigError("data must be nested evenly, and some of its rows are longer than others") from error


@functools.cache
def _decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    kind: Any = float if DTYPES[datatype].is_floating_point else bool if datatype == "BOOL" else int
    for _ in range(depth):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def _finite(array: Array) -> Array:
    if array.dtype.kind not in WHOLE and not (is_finite := np.isfinite(array)).all():
        bad = array.size - int(is_finite.sum())
        raise ConfigError(f"finite numbers were needed, and {bad} of {array.size} are NaN, infinite or too large")
    return array
