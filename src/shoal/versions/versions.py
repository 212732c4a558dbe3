"""A run's versions in its store: written whole, checked when read, kept by a rule. Imports torch only for tensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from shoal.clock import Clock, SystemClock
from shoal.errors import Bug, ConfigError, StoreFault, VersionFault
from shoal.versions.store import Absent, Bytes, Exists, Store

if TYPE_CHECKING:
    from shoal.versions.snapshot import Snapshot

_T = TypeVar("_T")
_FORMAT = 1
_FOLDER = "versions"
_MANIFEST = "manifest.json"
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a version's file must be."""

    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a version: its step, fingerprint and files. ``created_at`` is ISO 8601 in UTC."""

    format: int
    step: int
    fingerprint: str
    created_at: str
    files: dict[str, FileRecord]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """A version that is there and cannot be used."""

    step: int
    reason: str


class Versions:
    """The versions in ``store``, under ``versions/{step:010d}/``: two safetensors files, then ``manifest.json``.

    The manifest is created last, and only if nobody has: a version without one does not exist, so a writer killed at
    any instruction leaves the versions before it as they were, and no step ever has two. The files bear the
    fingerprint in their names, so that a writer of another history, refused in the end, has overwritten nothing.
    Kept are the newest ``keep_last`` versions and those whose step is a multiple of ``keep_every_steps``.
    """

    def __init__(
        self, store: Store, keep_last: int = 3, keep_every_steps: int | None = None, clock: Clock | None = None
    ) -> None:
        if keep_last < 1 or (keep_every_steps is not None and keep_every_steps < 1):
            raise ConfigError(
                f"keep_last and keep_every_steps must be at least 1; they are {keep_last} and {keep_every_steps}"
            )
        self._store = store
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        self._clock = clock or SystemClock()

    def write(self, snapshot: Snapshot) -> Manifest:
        """Store ``snapshot``, whose meta must hold its ``"fingerprint"``; then prune.

        The same step again with the same fingerprint changes nothing; with another it is a ``VersionFault``, unless
        what is stored is damaged: that is no version, and is replaced. Its tensors are hashed and written where they
        lie, without a further copy. ``StoreFault`` if the store refuses; then nothing that was stored has changed.
        """
        fingerprint = str(snapshot.meta.get("fingerprint", ""))
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise Bug(f"the meta of step {snapshot.step} needs a fingerprint of 16 hex digits; it has {fingerprint!r}")
        stored = self._kept(snapshot.step) or self._add(snapshot, fingerprint)
        if stored.fingerprint != fingerprint:
            raise VersionFault(
                f"step {snapshot.step} is stored in {self._store.url} as {stored.fingerprint}, and came as"
                f" {fingerprint}, but there is one history; does another run write to this store?",
                step=snapshot.step,
            )
        with contextlib.suppress(StoreFault):  # what could not be deleted is found again after the next write
            self.prune()
        return stored

    def _add(self, snapshot: Snapshot, fingerprint: str) -> Manifest:
        from shoal.versions.tensor_file import to_parts

        tensors = (snapshot.model, snapshot.optimizer)
        parts = {file: to_parts(t) for file, t in zip(_files(fingerprint), tensors, strict=True)}
        manifest = Manifest(
            format=_FORMAT,
            step=snapshot.step,
            fingerprint=fingerprint,
            created_at=datetime.fromtimestamp(self._clock.wall_s(), UTC).isoformat(timespec="milliseconds"),
            files={file: _record(file_parts) for file, file_parts in parts.items()},
            meta=dict(snapshot.meta),
        )
        text = _to_json(manifest)
        for file, file_parts in parts.items():
            self._store.put(_name(snapshot.step, file), *file_parts)
        try:
            self._store.create(_name(snapshot.step, _MANIFEST), text)
        except Exists:
            return self.manifest(snapshot.step)
        return manifest

    def steps(self) -> list[int]:
        """The steps that are stored, in order. Their files are not looked at."""
        return [step for step in self._folders() if self._has_manifest(step)]

    def newest(self) -> int | None:
        """The newest stored step, if there is one. Its files are not looked at."""
        return next((step for step in reversed(self._folders()) if self._has_manifest(step)), None)

    def manifest(self, step: int) -> Manifest:
        """What is stored of ``step``; ``VersionFault`` if nothing is, or its manifest is damaged."""
        where = f"{self._store.url}/{_name(step, _MANIFEST)}"
        try:
            manifest = msgspec.json.decode(self._store.read(_name(step, _MANIFEST)), type=Manifest)
        except Absent as error:
            raise VersionFault(f"no version of step {step} is stored in {self._store.url}", step=step) from error
        except msgspec.MsgspecError as error:
            raise VersionFault(f"{where} is damaged: {error}", step=step) from error
        if manifest.format != _FORMAT:
            reason = f"is of format {manifest.format}, and this shoal reads {_FORMAT}; use the one that wrote it"
            raise VersionFault(f"{where} {reason}", step=step)
        genuine = manifest.step == step and _FINGERPRINT.fullmatch(manifest.fingerprint)
        if not genuine or manifest.files.keys() != {*_files(manifest.fingerprint)}:
            what = f"step {manifest.step}, {manifest.fingerprint}, and the files {sorted(manifest.files)}"
            raise VersionFault(f"{where} is not of this version: it tells of {what}", step=step)
        return manifest

    def read(self, step: int | None = None) -> Snapshot:
        """The version of ``step``, or the newest, every byte checked.

        ``VersionFault`` names the file that is damaged and the newest good version before it.
        """
        chosen = self.newest() if step is None else step
        if chosen is None:
            raise VersionFault(f"no version is stored in {self._store.url}")
        try:
            return self._read(chosen)
        except VersionFault as fault:
            before = next((s for s in reversed(self.steps()) if s < chosen and self._good(s)), None)
            offer = "no good version is before it" if before is None else f"the newest good one before it is {before}"
            raise VersionFault(f"{fault.message}; {offer}", step=chosen) from fault

    def read_newest_good(self) -> tuple[Snapshot, list[Refused]]:
        """The newest version that is undamaged, and those newer than it; ``VersionFault`` if none is left."""
        snapshot, refused = self._first_good(self._read)
        if snapshot is None:
            reasons = "".join(f"; {r.reason}" for r in refused)
            raise VersionFault(f"no good version is stored in {self._store.url}{reasons}")
        return snapshot, refused

    def newest_good(self) -> tuple[Manifest | None, list[Refused]]:
        """The newest version that is undamaged, if there is one, and those newer than it. Reads every byte of it."""
        return self._first_good(self._check)

    def discard(self, step: int) -> None:
        """Make ``step`` no version any more, such as a damaged one before a run goes on from the one before it."""
        self._store.delete(_name(step, _MANIFEST))
        self._store.delete(f"{_FOLDER}/{step:010d}")

    def prune(self) -> None:
        """Delete the versions that the rule does not keep, and what is left of writes that were cut off before the
        newest."""
        kept = self.steps()
        if not kept:
            return
        every = self._keep_every_steps
        kept = [step for step in kept if step in kept[-self._keep_last :] or (every and step % every == 0)]
        for step in self._folders():
            if step not in kept and step < kept[-1]:
                self.discard(step)

    def _folders(self) -> list[int]:
        return sorted(int(name) for name in self._store.list(_FOLDER) if name.isdecimal() and len(name) == 10)

    def _has_manifest(self, step: int) -> bool:
        return _MANIFEST in self._store.list(f"{_FOLDER}/{step:010d}")

    def _kept(self, step: int) -> Manifest | None:
        """What is stored of ``step``, if it is good; what is damaged stops to be a version."""
        if not self._has_manifest(step):
            return None
        manifest = self._good(step)
        if manifest is None:
            self._store.delete(_name(step, _MANIFEST))
        return manifest

    def _first_good(self, reader: Callable[[int], _T]) -> tuple[_T | None, list[Refused]]:
        refused: list[Refused] = []
        for step in reversed(self.steps()):
            try:
                return reader(step), refused
            except VersionFault as fault:
                refused.append(Refused(step, fault.message))
        return None, refused

    def _good(self, step: int) -> Manifest | None:
        try:
            return self._check(step)
        except VersionFault:
            return None

    def _check(self, step: int) -> Manifest:
        """The manifest of ``step``; ``VersionFault`` unless all of it is there and undamaged."""
        manifest = self.manifest(step)
        for file in manifest.files:
            self._checked(manifest, file)
        return manifest

    def _read(self, step: int) -> Snapshot:
        from shoal.versions.snapshot import Snapshot
        from shoal.versions.tensor_file import from_bytes

        manifest = self.manifest(step)
        model, optimizer = (
            from_bytes(self._checked(manifest, file), f"{self._store.url}/{_name(step, file)}")
            for file in _files(manifest.fingerprint)
        )
        return Snapshot(step, model, optimizer, manifest.meta)

    def _checked(self, manifest: Manifest, file: str) -> Bytes:
        name = _name(manifest.step, file)
        where, wanted = f"{self._store.url}/{name}", manifest.files[file]
        try:
            data = self._store.read(name)
        except Absent as error:
            raise VersionFault(f"{where} is missing", step=manifest.step) from error
        if len(data) != wanted.size_bytes:
            raise VersionFault(f"{where} is {len(data)} bytes, and should be {wanted.size_bytes}", step=manifest.step)
        if _record([data]) != wanted:
            raise VersionFault(f"{where} is damaged: its sha256 is not that of its manifest", step=manifest.step)
        return data


def _name(step: int, file: str) -> str:
    return f"{_FOLDER}/{step:010d}/{file}"


def _files(fingerprint: str) -> tuple[str, str]:
    return f"model-{fingerprint}.safetensors", f"optimizer-{fingerprint}.safetensors"


def _record(parts: Sequence[Bytes]) -> FileRecord:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=sum(len(part) for part in parts))


def _to_json(manifest: Manifest) -> bytes:
    """As JSON; ``ConfigError`` if the meta would come back as something else: NaN, keys that are no strings, tuples."""
    value: Mapping[str, Any] = msgspec.to_builtins(manifest)
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the meta of step {manifest.step} is not JSON: {error}") from error
    if json.loads(text)["meta"] != manifest.meta:
        raise ConfigError(f"the meta of step {manifest.step} is not JSON: a key is no string, or a list is a tuple")
    return text.encode()
