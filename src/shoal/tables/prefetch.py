"""Asking for memory before it is needed: while a compiled loop waits for what one id needs, what later ones need is on
its way. An instruction of LLVM that changes nothing but time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_LINE_BYTES, _NUM_LINES = 64, 4
_WRITE, _KEEP, _DATA = 1, 3, 1


def _ask(builder: Any, pointer: Any) -> None:
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")  # type: ignore[no-untyped-call]
    builder.call(function, [builder.bitcast(pointer, byte), *(word(n) for n in (_WRITE, _KEEP, _DATA))])


def _pointer(context: Any, builder: Any, kind: Any, array: Any, indices: list[Any]) -> Any:
    view = context.make_array(kind)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, kind, view, indices, wraparound=False)  # type: ignore[no-untyped-call]


def _prefetch(_typing: Any, array: Any, _index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _ask(builder, _pointer(context, builder, signature.args[0], arguments[0], [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def _prefetch_row(_typing: Any, array: Any, _index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start = [arguments[1], context.get_constant(types.intp, 0)]
        first = _pointer(context, builder, signature.args[0], arguments[0], start)
        byte = builder.bitcast(first, ir.IntType(8).as_pointer())
        for line in range(_NUM_LINES):
            _ask(builder, builder.gep(byte, [ir.IntType(64)(line * _LINE_BYTES)]))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


prefetch: Any = intrinsic(_prefetch)
"""``prefetch(array, index)``: an entry of a vector is going to be read or written."""

prefetch_row: Any = intrinsic(_prefetch_row)
"""``prefetch_row(array, index)``: a row of a matrix is, up to its first four cache lines."""
