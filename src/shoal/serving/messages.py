"""The messages of the Open Inference Protocol's gRPC service, made from ``open_inference.proto``.

In place of generated code, which registers its messages for the whole process: there a second package that speaks the
protocol, such as a client of it, could not be imported.
"""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from typing import Any

from shoal.serving.extra import serve_extra

with serve_extra():
    from google.protobuf import descriptor_pool, message_factory
    from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

PROTO = files("shoal.serving").joinpath("open_inference.proto")
_PACKAGE = "inference"
_FIELD = re.compile(r"(repeated )?(?:map<string, (\w+)>|(\w+)) (\w+) = (\d+);")


@functools.cache
def message(name: str) -> Any:
    """The class of a message, such as ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


@functools.cache
def _pool() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(describe(PROTO.read_text()).SerializeToString())
    return pool


def describe(text: str) -> Any:
    """The messages of a ``.proto``, as ``FileDescriptorProto``. It may have what this one has, each on its line."""
    file = FileDescriptorProto(name="shoal/open_inference.proto", package=_PACKAGE, syntax="proto3")
    open_messages: list[Any] = []
    is_service = is_oneof = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("service "):
            is_service = True
        elif line.startswith("message "):
            into = open_messages[-1].nested_type if open_messages else file.message_type
            open_messages.append(into.add(name=line.split()[1]))
        elif line.startswith("oneof "):
            is_oneof = True
            open_messages[-1].oneof_decl.add(name=line.split()[1])
        elif line == "}":
            if not (is_service or is_oneof):
                open_messages.pop()
            is_service = is_oneof = False
        elif found := _FIELD.fullmatch(line):
            _add_field(open_messages, found, is_oneof)
    return file


def _add_field(within: list[Any], found: re.Match[str], is_oneof: bool) -> None:
    repeated, mapped_to, kind, name, number = found.groups()
    label = FieldDescriptorProto.LABEL_REPEATED if repeated or mapped_to else FieldDescriptorProto.LABEL_OPTIONAL
    field = within[-1].field.add(name=name, number=int(number), label=label)
    if mapped_to:
        kind = f"{name.title()}Entry"
        within[-1].nested_type.append(_entry(kind, mapped_to))
    _set_type(field, kind, within)
    if is_oneof:
        field.oneof_index = 0


def _set_type(field: Any, kind: str, within: list[Any]) -> None:
    scalar = f"TYPE_{kind.upper()}"
    if scalar in FieldDescriptorProto.Type.keys():  # noqa: SIM118 - it is no mapping
        field.type = FieldDescriptorProto.Type.Value(scalar)
        return
    is_nested = any(kind == nested.name for nested in within[-1].nested_type)
    path = [_PACKAGE, *(outer.name for outer in within if is_nested), kind]
    field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, "." + ".".join(path)


def _entry(name: str, value: str) -> Any:
    entry = DescriptorProto(name=name)
    optional = FieldDescriptorProto.LABEL_OPTIONAL
    entry.field.add(name="key", number=1, label=optional, type=FieldDescriptorProto.TYPE_STRING)
    entry.field.add(
        name="value", number=2, label=optional, type=FieldDescriptorProto.TYPE_MESSAGE, type_name=f".{_PACKAGE}.{value}"
    )
    entry.options.map_entry = True
    return entry
