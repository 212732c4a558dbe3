"""What makes files a version: a record of them that carries its own checksum."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from shoal.errors import Bug, ConfigError, VersionFault
from shoal.versions.store import Bytes

FORMAT = 1
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a version's file must be."""

    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A version's step, fingerprint, files and meta.

    ``created_at`` is ISO 8601 in UTC. ``sha256`` is that of the JSON of all else, keys sorted and without spaces.
    """

    format: int = FORMAT
    step: int
    fingerprint: str
    created_at: str
    files: dict[str, FileRecord]
    meta: dict[str, Any]
    sha256: str = ""


def file_names(fingerprint: str) -> tuple[str, str, str]:
    """The model's, the optimizer's, and the strategy's, which may be lacking; ``Bug`` if it is no fingerprint."""
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise Bug(f"a version needs a fingerprint of 16 hex digits in its meta, and has {fingerprint!r}")
    return tuple(f"{part}-{fingerprint}.safetensors" for part in ("model", "optimizer", "strategy"))  # type: ignore[return-value]


def record_of(parts: Sequence[Bytes]) -> FileRecord:
    """The record of a file made of ``parts``."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=sum(len(part) for part in parts))


def sealed(manifest: Manifest) -> Manifest:
    """With its checksum; ``ConfigError`` if JSON cannot hold the meta: NaN, or an object of Python's."""
    try:
        return msgspec.structs.replace(manifest, sha256=_checksum(manifest))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the meta of step {manifest.step} is not JSON: {error}") from error


def to_json(manifest: Manifest) -> bytes:
    """A sealed manifest, for people to read too; ``ConfigError`` if its meta would come back as something else."""
    text = json.dumps(msgspec.to_builtins(manifest), indent=1, allow_nan=False).encode()
    if msgspec.json.decode(text, type=Manifest) != manifest:
        raise ConfigError(
            f"the meta of step {manifest.step} is not what JSON can hold: a key is no string, or a list is a tuple;"
            " convert it"
        )
    return text


def from_json(data: Bytes, step: int, where: str) -> Manifest:
    """The manifest of ``step``; ``VersionFault`` naming ``where`` if it is damaged, of another format or another's."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise VersionFault(f"{where} is damaged: {error}", step=step) from error
    if manifest.format != FORMAT:
        came = f"is of format {manifest.format}, and this shoal reads {FORMAT}; use the one that wrote it"
        raise VersionFault(f"{where} {came}", step=step)
    if manifest.sha256 != _checksum(manifest):
        raise VersionFault(f"{where} is damaged: its checksum is not that of its content", step=step)
    genuine = manifest.step == step and _FINGERPRINT.fullmatch(manifest.fingerprint)
    known = file_names(manifest.fingerprint) if genuine else ()
    if not set(known[:2]) <= manifest.files.keys() <= set(known) or not genuine:
        came = f"step {manifest.step}, {manifest.fingerprint}, and the files {sorted(manifest.files)}"
        raise VersionFault(f"{where} is not of this version: it tells of {came}", step=step)
    return manifest


def _checksum(manifest: Manifest) -> str:
    content = msgspec.to_builtins(msgspec.structs.replace(manifest, sha256=""))
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
