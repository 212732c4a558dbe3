"""Asking for memory before it is needed: within a compiled loop over many ids, what one of them waits for is what
another has asked for. An instruction of LLVM that changes nothing but time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_LINE_BYTES = 64
_WRITE, _KEEP, _DATA = 1, 3, 1


def _ask(context: Any, builder: Any, pointer: Any) -> None:
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.bitcast(pointer, byte), *(word(n) for n in (_WRITE, _KEEP, _DATA))])


def _pointer(context: Any, builder: Any, kind: Any, array: Any, indices: list[Any]) -> Any:
    view = context.make_array(kind)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, kind, view, indices, wraparound=False)


@intrinsic  # type: ignore[misc]
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """An entry of a vector is going to be read or written."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _ask(context, builder, _pointer(context, builder, signature.args[0], arguments[0], [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic  # type: ignore[misc]
def prefetch_row(typing: Any, array: Any, index: Any) -> Any:
    """A row of a matrix is, up to its first four cache lines."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = context.get_constant(types.intp, 0)
        first = _pointer(context, builder, signature.args[0], arguments[0], [arguments[1], zero])
        byte = builder.bitcast(first, ir.IntType(8).as_pointer())
        for line in range(4):
            _ask(context, builder, builder.gep(byte, [ir.IntType(64)(line * _LINE_BYTES)]))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate
