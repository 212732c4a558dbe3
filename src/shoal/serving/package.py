"""The model package: a folder of data that every server reads, and of which nothing runs.

``MANIFEST.json`` names all other files, each with its size and sha256, under a checksum of its own. ``model.json`` says
what the model is (``Description``). ``model.safetensors`` holds its parameters and buffers, ``table-N.safetensors`` the
rows of a sparse table, ``probe.safetensors`` samples and what the model said of them when it was exported. The code is
not in it: who serves it brings the task, whose revision must be the one that is described.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from shoal.errors import ConfigError, VersionFault
from shoal.job.task import TensorSpec
from shoal.serving.whole import whole
from shoal.tables.files import flush
from shoal.versions.manifest import FileRecord, record_of
from shoal.versions.tensor_file import from_bytes, to_parts

FORMAT = 1
MANIFEST, MODEL, TENSORS, PROBE = "MANIFEST.json", "model.json", "model.safetensors", "probe.safetensors"
SIGNATURE = "model.sig"
"""Of an optional signature, which the manifest cannot name: it is of the manifest, too."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_MOST_JSON_BYTES = 1 << 24
_INPUT, _OUTPUT = "input/", "output/"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``sha256`` is that of the JSON of all else, keys sorted and without spaces: the package's digest."""

    format: int
    files: dict[str, FileRecord]
    sha256: str = ""

    def digest(self) -> str:
        content = msgspec.to_builtins(msgspec.structs.replace(self, sha256=""))
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class TaskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Which code the model is of: its class, the job file's name, the revision of that and of what it imports from its
    folder, and the fields that were set."""

    name: str
    job_file: str
    revision: str
    settings: list[str] = []


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is. ``lineage``: run, step, fingerprint, what it was trained on, and by which libraries.
    ``tables``: of each ``table-N.safetensors`` the meta of its image."""

    format: int = FORMAT
    name: str
    version: int
    created_at: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    task: TaskRecord
    metrics: dict[str, Any]
    lineage: dict[str, Any]
    tables: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Probe:
    """Samples as requests carry them, and the answers that the model gave; none where a task's samples do not say what
    its requests carry."""

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Package:
    """What is in one. ``tables``: the arrays of each table's image, by name. ``digest``: the manifest's, once it was
    read."""

    description: Description
    tensors: Mapping[str, Tensor]
    probe: Probe
    tables: Sequence[Mapping[str, Tensor]] = ()
    digest: str = ""

    def files(self) -> dict[str, list[Any]]:
        """Each file's name and parts, but for the manifest's."""
        probe = {_INPUT + name: tensor for name, tensor in self.probe.inputs.items()}
        probe |= {_OUTPUT + name: tensor for name, tensor in self.probe.outputs.items()}
        text = msgspec.json.format(msgspec.json.encode(self.description), indent=1)
        files: dict[str, list[Any]] = {MODEL: [text], TENSORS: to_parts(self.tensors), PROBE: to_parts(probe)}
        return files | {f"table-{number}.safetensors": to_parts(arrays) for number, arrays in enumerate(self.tables)}


def write(
    package: Package, folder: Path, beside: Mapping[str, bytes] | None = None, sign_with: Path | None = None
) -> Manifest:
    """Make ``folder`` a package, whole or not at all. ``beside``: further files in it; ``sign_with``: the file of a
    private key. ``ConfigError`` if it is there already, or the key is none; ``StoreFault`` if it cannot be written."""
    parts = {**package.files(), **{name: [data] for name, data in (beside or {}).items()}}
    files = {name: record_of(pieces) for name, pieces in parts.items()}
    manifest = Manifest(format=FORMAT, files=files)
    manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
    with whole(folder) as partial:
        partial.mkdir()
        for name, pieces in parts.items():
            _write(partial / name, pieces)
        _write(partial / MANIFEST, [msgspec.json.format(msgspec.json.encode(manifest), indent=1)])
        if sign_with is not None:
            from shoal.serving.signing import sign

            sign(partial, SIGNATURE, sign_with)
            flush(partial / SIGNATURE)
    return manifest


def _write(path: Path, pieces: Sequence[Any]) -> None:
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path, signed_by: Path | None = None) -> Package:
    """All of it, every file checked against the manifest; what the checksums are of is what is returned.
    ``signed_by``: the file of the public key whose owner must have signed that. ``ConfigError`` for what is no package
    of this format, names what is none of its files, or has no signature; ``VersionFault`` for one that is damaged, not
    whole, or not the signed one."""
    manifest = _manifest(folder)
    if signed_by is not None:
        _require_signed(folder, manifest, signed_by)
    contents = {name: _checked(folder, name, manifest) for name in manifest.files}
    try:
        description = msgspec.json.decode(contents[MODEL], type=Description)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{folder / MODEL} does not describe a model: {error}") from error
    tensors = {
        name: from_bytes(data, f"{folder / name}") for name, data in contents.items() if name.endswith(".safetensors")
    }
    names = [f"table-{number}.safetensors" for number in range(len(description.tables))]
    if missing := {TENSORS, PROBE, *names} - tensors.keys():
        raise VersionFault(f"{folder} lacks {', '.join(sorted(missing))}; export it again")
    probe = tensors[PROBE]
    return Package(
        description=description,
        tensors=tensors[TENSORS],
        probe=Probe(*({k.removeprefix(p): t for k, t in probe.items() if k.startswith(p)} for p in (_INPUT, _OUTPUT))),
        tables=[tensors[name] for name in names],
        digest=manifest.sha256,
    )


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        data = _bytes(path, _MOST_JSON_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{folder} is no model package: it has no {MANIFEST}; `shoal export` makes one") from None
    try:
        fmt = msgspec.json.decode(data, type=dict[str, Any]).get("format")
        if fmt != FORMAT:
            raise ConfigError(f"{path} is of format {fmt}, and this shoal reads {FORMAT}; use the one that wrote it")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise VersionFault(f"{path} is damaged: {error}") from error
    if manifest.sha256 != manifest.digest():
        raise VersionFault(f"{path} is damaged: its checksum is not that of its content")
    for name in manifest.files:
        if not _NAME.fullmatch(name) or name in (MANIFEST, SIGNATURE):
            raise ConfigError(f"{path} names {name!r}, which cannot be a file of a package; do not use it")
    if MODEL not in manifest.files:
        raise VersionFault(f"{folder} lacks {MODEL}; export it again")
    known = {MANIFEST, SIGNATURE, *manifest.files}
    if strangers := sorted(entry for entry in os.listdir(folder) if entry not in known):
        raise ConfigError(f"{folder} holds {', '.join(strangers)}, of which its manifest does not know; remove it")
    return manifest


def _require_signed(folder: Path, manifest: Manifest, key: Path) -> None:
    from shoal.serving.signing import require_signature

    try:
        data = _bytes(folder / SIGNATURE, _MOST_JSON_BYTES)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} must be signed, and it has no {SIGNATURE}; take one that is, or export it again with --sign"
        ) from None
    require_signature(folder, data, {name: record.sha256 for name, record in manifest.files.items()}, key)


def _checked(folder: Path, name: str, manifest: Manifest) -> bytes:
    path, wanted = folder / name, manifest.files[name]
    try:
        data = _bytes(path, wanted.size_bytes)
    except FileNotFoundError:
        raise VersionFault(f"{path} is missing; copy the package again") from None
    if record_of([data]) != wanted:
        raise VersionFault(f"{path} is damaged: it is not what the manifest says; copy the package again")
    return data


def _bytes(path: Path, most: int) -> bytes:
    """A file's, itself and no link to it. ``VersionFault`` if it has more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path} is a link or cannot be read, and a package has files only: {error}") from error
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is no file, and a package has files only")
        if status.st_size > most:
            raise VersionFault(f"{path} has {status.st_size} bytes, and {most} were to be there at most")
        return file.read(most + 1)
