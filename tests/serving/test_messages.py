"""The messages are the protocol's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from shoal.errors import ConfigError
from shoal.serving.messages import PROTO, describe, message
from tests.serving.test_server_and_client import Without


def plain(messages: Any) -> list[Any]:
    """What is said of messages, without what only eases their use."""
    return [
        (
            one.name, plain(one.nested_type), one.options.map_entry, [oneof.name for oneof in one.oneof_decl],
            [(f.name, f.number, f.label, f.type, f.type_name, f.HasField("oneof_index")) for f in one.field],
        )
        for one in messages
    ]  # fmt: skip


def test_they_are_what_the_compiler_makes_of_their_file(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    made, source = tmp_path / "made", tmp_path / "open_inference.proto"
    source.write_text(PROTO.read_text())
    assert protoc.main(["protoc", f"-I{tmp_path}", f"--descriptor_set_out={made}", str(source)]) == 0
    (file,) = FileDescriptorSet.FromString(made.read_bytes()).file
    ours = describe(PROTO.read_text())
    assert (ours.package, ours.syntax) == (file.package, file.syntax)
    assert plain(ours.message_type) == plain(file.message_type)


def fields(descriptor: Any) -> Iterator[tuple[str, int, int]]:
    for field in descriptor.fields:
        yield f"{descriptor.full_name}.{field.name}", field.number, field.type
    for nested in descriptor.nested_types:
        yield from fields(nested)


def test_they_are_what_a_public_client_has() -> None:
    theirs = pytest.importorskip("tritonclient.grpc.service_pb2")
    for name in (one.name for one in describe(PROTO.read_text()).message_type):
        known = set(fields(theirs.DESCRIPTOR.message_types_by_name[name]))
        assert set(fields(message(name).DESCRIPTOR)) <= known, name


def test_another_package_with_the_same_messages_can_be_imported() -> None:
    assert message("ModelInferRequest").DESCRIPTOR.file.pool is not descriptor_pool.Default()


@pytest.mark.parametrize(("missing", "package"), [("grpc", "grpcio"), ("google", "protobuf")])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, missing: str, package: str) -> None:
    own = ("shoal.serving.rpc", "shoal.serving.messages", "shoal.serving.protobuf")
    for name in [name for name in sys.modules if name.split(".")[0] == missing or name in own]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(missing), *sys.meta_path])
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install 'shoal\[grpc\]'"):
        importlib.import_module("shoal.serving.rpc")
