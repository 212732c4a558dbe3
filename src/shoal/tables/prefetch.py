"""Asking for memory before it is needed: while a compiled loop waits for what one id needs, what later ones need is on
its way. An instruction of LLVM that changes nothing but time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shoal.compiling import kernel

_LINE_WORDS, _MOST_WORDS = 16, 64
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


def _prefetch_word(_typing: Any, array: Any, _row: Any, _column: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _ask(builder, _pointer(context, builder, signature.args[0], arguments[0], [arguments[1], arguments[2]]))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


prefetch: Any = intrinsic(_prefetch)
"""``prefetch(array, index)``: an entry of a vector is going to be read or written."""

_prefetch_word_of: Any = intrinsic(_prefetch_word)


@kernel
def prefetch_row(rows: Any, row: int, num_words: int) -> None:
    """The first words of 4 bytes of a matrix's row are going to be, up to four cache lines of them and their last."""
    for word in range(0, min(num_words, _MOST_WORDS), _LINE_WORDS):
        _prefetch_word_of(rows, row, word)
    _prefetch_word_of(rows, row, num_words - 1)
