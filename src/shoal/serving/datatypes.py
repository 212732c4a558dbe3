"""The Open Inference Protocol's datatypes as torch's, in JSON and in bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.errors import ConfigError
from shoal.job.task import TensorSpec

Buffer = bytes | memoryview

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
# NumPy has no bfloat16; float32 holds all of its values.
_NUMPY_DTYPES = {
    name: np.dtype(np.float32) if name == "BF16" else torch.empty(0, dtype=dtype).numpy().dtype
    for name, dtype in DTYPES.items()
}

_NARROW = frozenset({"FP16", "BF16", "FP32"})
"""Into which a number of JSON may not fit: it is infinite then, and refused as that."""


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


def from_json(data: Buffer, datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor of ``shape`` from a JSON array, flat in row-major order or nested as the shape is.

    ``ConfigError`` if the elements are of another kind or count, do not fit into the datatype, or are not finite.
    """
    try:
        values: list[Any] = _decoder(datatype, 1).decode(data)
    except msgspec.ValidationError:  # nested, or wrong
        return _from_nested_json(data, datatype, shape)
    require_count(len(values), shape)
    return _tensor(_packed(values, datatype).reshape(tuple(shape)), datatype)


def _from_nested_json(data: Buffer, datatype: str, shape: Sequence[int]) -> Tensor:
    depth = _depth(data)
    if depth not in (1, len(shape)):
        raise ConfigError(f"data must be an array, flat or nested {len(shape)} deep, and it is nested {depth} deep")
    array = _array(data, datatype, depth)
    if array.shape != tuple(shape):
        raise ConfigError(f"data nested as {list(shape)} was needed, and it is nested as {list(array.shape)}")
    return _tensor(array, datatype)


def from_nested(data: bytes, datatype: str, num_axes: int) -> Tensor:
    """A tensor from a JSON array, nested as deep as the tensor has axes. ``ConfigError`` as in ``from_json``."""
    depth = _depth(data)
    if depth != num_axes:
        raise ConfigError(f"an array nested {num_axes} deep was needed, and it is nested {depth} deep")
    return _tensor(_array(data, datatype, depth), datatype)


def from_values(values: Sequence[Any], datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor of ``shape`` from numbers in row-major order. ``ConfigError`` as in ``from_json``."""
    require_count(len(values), shape)
    return _tensor(_packed(list(values), datatype).reshape(tuple(shape)), datatype)


def from_bytes(data: memoryview, datatype: str, shape: Sequence[int]) -> Tensor:
    """A tensor of ``shape`` from its row-major little-endian bytes. ``ConfigError`` as in ``from_json``."""
    dtype = DTYPES[datatype]
    needed = math.prod(shape) * dtype.itemsize
    if len(data) != needed:
        raise ConfigError(f"{datatype} of shape {list(shape)} takes {needed} bytes, and {len(data)} came")
    if dtype == torch.bool:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(tuple(shape)) != 0
    return _finite(torch.frombuffer(bytearray(data), dtype=dtype).reshape(tuple(shape)))


def to_json(tensor: Tensor) -> list[Any]:
    """Flat values in row-major order. ``ConfigError`` if one is not finite, which JSON cannot say."""
    flat: list[Any] = tensor.reshape(-1).tolist()
    if tensor.is_floating_point() and not math.isfinite(sum(flat)):  # numbers may be finite, and their sum be not
        _finite(tensor.detach().cpu())
    return flat


def to_nested(tensor: Tensor) -> list[Any]:
    """Values nested as the shape is. ``ConfigError`` as in ``to_json``."""
    nested: list[Any] = _finite(tensor.detach().cpu()).tolist()
    return nested


def to_bytes(tensor: Tensor) -> bytes:
    """Row-major little-endian bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


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


def _array(data: Buffer, datatype: str, depth: int) -> NDArray[Any]:
    try:
        values = _decoder(datatype, depth).decode(data)
    except msgspec.ValidationError as error:
        raise ConfigError(f"data must be {datatype} values: {error}") from error
    return _packed(values, datatype)


def _packed(values: list[Any], datatype: str) -> NDArray[Any]:
    if datatype == "UINT8" and values and type(values[0]) is int:  # as NumPy does, and three times as fast
        try:
            return np.frombuffer(bytearray(values), np.uint8)
        except ValueError as error:
            raise ConfigError(f"data must fit into UINT8: {error}") from error
    try:
        if datatype not in _NARROW:
            return np.array(values, dtype=_NUMPY_DTYPES[datatype])
        with np.errstate(over="ignore"):
            return np.array(values, dtype=_NUMPY_DTYPES[datatype])
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


def _tensor(array: NDArray[Any], datatype: str) -> Tensor:
    """Checked, and of that datatype."""
    if datatype == "BF16":  # of which NumPy knows nothing, and into which not all of float32 fits
        return _finite(torch.from_numpy(array).to(torch.bfloat16))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        _refuse_infinite(array.size, int(np.isfinite(array).sum()))
    return torch.from_numpy(array)


def _finite(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not (is_finite := torch.isfinite(tensor)).all():
        _refuse_infinite(tensor.numel(), int(is_finite.sum()))
    return tensor


def _refuse_infinite(num: int, num_finite: int) -> NoReturn:
    bad = num - num_finite
    raise ConfigError(f"finite numbers were needed, and {bad} of {num} are NaN, infinite or too large")
