"""Named tensors as the parts of one safetensors file, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors
import torch
from safetensors.torch import load
from torch import Tensor

from shoal.errors import ConfigError, VersionFault
from shoal.versions.store import Bytes

_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's values in row-major order; of a contiguous CPU tensor not a copy, so keep it unchanged meanwhile."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def to_parts(tensors: Mapping[str, Tensor]) -> list[Bytes]:
    """A safetensors file's header and then its tensors, widest elements first so that each lies aligned.

    Format: https://huggingface.co/docs/safetensors, "Format". ``safetensors.torch.save`` gives the same file as one
    ``bytes``, which takes the tensors' size in memory once or twice more; these parts are the tensors themselves.
    ``ConfigError`` for a dtype that the format does not know.
    """
    header: dict[str, Any] = {}
    parts: list[Bytes] = []
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _dtype(name, tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        if end > offset:
            parts.append(bytes_of(tensor))
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *parts]


def _dtype(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPES:
        raise ConfigError(f"{name} is {tensor.dtype}, which safetensors cannot hold; convert it to one of {[*_DTYPES]}")
    return _DTYPES[tensor.dtype]


def from_bytes(data: Bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ``VersionFault`` naming ``where`` if it is not one."""
    try:
        return load(bytes(data))
    except (safetensors.SafetensorError, KeyError) as error:
        raise VersionFault(f"{where} is no safetensors file that this torch can read: {error}") from error
