"""A run's versions in its store: written whole, checked when read, kept by a rule. Imports torch only for tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from shoal.clock import Clock, SystemClock
from shoal.errors import ConfigError, StoreFault, VersionFault
from shoal.versions.manifest import Manifest, file_names, from_json, record_of, sealed, to_json
from shoal.versions.store import Absent, Bytes, Exists, Store

if TYPE_CHECKING:
    from shoal.versions.snapshot import Snapshot

_T = TypeVar("_T")
_FOLDER = "versions"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Refused:
    """A version that is there and cannot be used."""

    step: int
    reason: str


class Versions:
    """The versions in ``store``, under ``versions/{step:010d}/``: safetensors files, then ``manifest.json``.

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

        tensors = (snapshot.model, snapshot.optimizer, *([snapshot.strategy] if snapshot.strategy else []))
        parts = {file: to_parts(t) for file, t in zip(file_names(fingerprint), tensors, strict=False)}
        now = datetime.fromtimestamp(self._clock.wall_s(), UTC)
        manifest = Manifest(
            step=snapshot.step,
            fingerprint=fingerprint,
            created_at=now.isoformat(timespec="milliseconds"),
            files={file: record_of(file_parts) for file, file_parts in parts.items()},
            meta=dict(snapshot.meta),
        )
        manifest = sealed(manifest)
        text = to_json(manifest)
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
        name = _name(step, _MANIFEST)
        try:
            data = self._store.read(name)
        except Absent as error:
            raise VersionFault(f"no version of step {step} is stored in {self._store.url}", step=step) from error
        return from_json(data, step, self._where(name))

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
        model, optimizer, strategy = (
            from_bytes(self._checked(manifest, file), self._where(_name(step, file))) if file in manifest.files else {}
            for file in file_names(manifest.fingerprint)
        )
        return Snapshot(step, model, optimizer, manifest.meta, strategy)

    def _checked(self, manifest: Manifest, file: str) -> Bytes:
        name = _name(manifest.step, file)
        where, wanted = self._where(name), manifest.files[file]
        try:
            data = self._store.read(name)
        except Absent as error:
            raise VersionFault(f"{where} is missing", step=manifest.step) from error
        if len(data) != wanted.size_bytes:
            raise VersionFault(f"{where} is {len(data)} bytes, and should be {wanted.size_bytes}", step=manifest.step)
        if record_of([data]) != wanted:
            raise VersionFault(f"{where} is damaged: its sha256 is not that of its manifest", step=manifest.step)
        return data

    def _where(self, name: str) -> str:
        return f"{self._store.url.rstrip('/')}/{name}"


def _name(step: int, file: str) -> str:
    return f"{_FOLDER}/{step:010d}/{file}"
