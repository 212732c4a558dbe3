"""What a journal leaves in its folder, read again: snapshots, logs, and the marks of steps.

``snapshot-N.safetensors`` holds all tables and their applier at one moment, ``log-N`` what came after; ``marks.json``
says for a step which snapshot and how much of its log make it up; ``tables.json`` which tables they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from shoal.errors import ConfigError, StoreFault
from shoal.tables.applying import Applier, applier_for
from shoal.tables.consistency import Async, Sync
from shoal.tables.files import write_whole
from shoal.tables.frame import Begin, Drop, Entry, Import, Push, decode
from shoal.tables.image import Image
from shoal.tables.log import read_records
from shoal.tables.spec import TableSpec
from shoal.tables.table import Table

Marks = Mapping[int, tuple[int, int]]
"""For a step: a snapshot's number, and bytes of its log."""


class Contents(msgspec.Struct, frozen=True):
    """Which tables a folder is of, of how many lanes the job is that pushes, and whether those take steps together."""

    specs: list[dict[str, Any]]
    num_lanes: int
    in_step: bool


@dataclass(frozen=True)
class JournalFolder:
    """Where what is."""

    path: Path

    def snapshot(self, number: int) -> Path:
        return self.path / f"snapshot-{number}.safetensors"

    def log(self, number: int) -> Path:
        return self.path / f"log-{number}"

    def numbered(self, prefix: str) -> list[tuple[int, Path]]:
        """Its files of a kind, with their numbers."""
        found = []
        for path in self.path.glob(f"{prefix}*"):
            number = path.name.removeprefix(prefix).removesuffix(".safetensors")
            if number.isdecimal():
                found.append((int(number), path))
        return found

    def marks(self) -> dict[int, tuple[int, int]]:
        path = self.path / "marks.json"
        if not path.exists():
            return {}
        return {int(step): (where[0], where[1]) for step, where in json.loads(path.read_text()).items()}

    def write_marks(self, marks: Marks) -> None:
        write_whole(self.path / "marks.json", json.dumps({str(step): where for step, where in marks.items()}).encode())

    def contents(self) -> Contents | None:
        """None if nothing has been opened there yet."""
        path = self.path / "tables.json"
        return msgspec.json.decode(path.read_bytes(), type=Contents) if path.exists() else None

    def write_contents(self, specs: Sequence[TableSpec], num_lanes: int, *, in_step: bool) -> None:
        contents = Contents([spec.record() for spec in specs], num_lanes, in_step)
        write_whole(self.path / "tables.json", msgspec.json.encode(contents))

    def check(self, specs: Sequence[TableSpec], num_lanes: int) -> None:
        """``ConfigError`` if the folder is of other tables, or of a job with other lanes."""
        contents = self.contents()
        if contents is None:
            return
        known = {spec.name: spec for spec in map(TableSpec.read, contents.specs)}
        for spec in specs:
            if spec.name in known and known[spec.name] != spec:
                raise ConfigError(f"{self.path} is of {known[spec.name]}, and an image of it is not one of {spec}")
        if set(known) != {spec.name for spec in specs}:
            raise ConfigError(f"{self.path} is of the tables {sorted(known)}, not of {sorted(s.name for s in specs)}")
        if contents.num_lanes != num_lanes:
            raise ConfigError(f"{self.path} is of a job with {contents.num_lanes} lanes, not {num_lanes}")


def read_snapshot(path: Path, tables: Mapping[str, Table], applier: Applier) -> None:
    """Have tables and applier stand as a snapshot says. ``StoreFault`` for one that is damaged, ``ConfigError`` for one
    of other tables."""
    try:
        with safe_open(path, "np") as file:
            meta: dict[str, Any] = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        standing, kept = meta["applier"], meta["tables"]
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise StoreFault(f"the snapshot {path} cannot be read: {error}") from None
    if set(kept) != set(tables):
        raise ConfigError(f"{path} is of the tables {sorted(kept)}, not of {sorted(tables)}")
    for name, table in tables.items():
        own = {key.removeprefix(f"{name}/"): a for key, a in arrays.items() if key.rpartition("/")[0] == name}
        table.apply(Image.of(kept[name], own))
    applier.read(standing)


def replay(bodies: Iterable[bytes], tables: Mapping[str, Table], applier: Applier) -> None:
    """Have tables and applier take what a log holds."""
    for body in bodies:
        take(decode(body), tables, applier)


def take(entry: Push | Entry, tables: Mapping[str, Table], applier: Applier) -> None:
    """One entry of a log, which is new."""
    match entry:
        case Push():
            applier.take(entry)
        case Begin():
            applier.begin(entry)
        case Import():
            arrays = load(entry.arrays)
            for name, meta in json.loads(entry.metas).items():
                own = {key.removeprefix(f"{name}/"): a for key, a in arrays.items() if key.rpartition("/")[0] == name}
                tables[name].set_to(Image.of(meta, own))
            if entry.applier:
                applier.read(json.loads(entry.applier))
        case Drop(packed):
            for table in tables.values():
                table.drop(unpacked(packed))


def packed(images: Mapping[str, Image], applier: Mapping[str, Any] | None = None) -> Import:
    """Images, and how an applier stands, to be handed over."""
    arrays = {f"{name}/{key}": array for name, image in images.items() for key, array in image.arrays().items()}
    metas = json.dumps({name: image.meta() for name, image in images.items()})
    return Import(metas, save(arrays), "" if applier is None else json.dumps(applier))


def unpacked(buckets: bytes) -> npt.NDArray[np.bool_]:
    """4096 bits as a mask."""
    return np.unpackbits(np.frombuffer(buckets, np.uint8)).astype(np.bool_)


class Followed:
    """The tables of a folder as of a step that was marked, for reading; the folder may be in use. They can be brought
    to a later step by what the log holds since, deletions too. ``StoreFault`` if the folder does not hold them."""

    def __init__(self, path: Path, step: int) -> None:
        self._folder = JournalFolder(path)
        contents = self._folder.contents()
        number, until = self._mark(step)
        assert contents is not None
        self._contents = contents
        self.tables = {spec.name: Table(spec) for spec in map(TableSpec.read, contents.specs)}
        consistency = Sync() if contents.in_step else Async()
        self._applier = applier_for(consistency, self.tables, contents.num_lanes)
        if number:
            read_snapshot(self._folder.snapshot(number), self.tables, self._applier)
        self._withdrawn: Sequence[Push] = ()
        self._at = (number, 0)
        self._go_to(step, until)

    def _mark(self, step: int) -> tuple[int, int]:
        contents, marks = self._folder.contents(), self._folder.marks()
        if contents is None or step not in marks:
            held = sorted(marks) or "none"
            raise StoreFault(f"{self._folder.path} does not hold the tables of step {step}; it holds {held}")
        return marks[step]

    def advance(self, step: int) -> bool:
        """Stand at a later step. False, and nothing is done, if the log from here to there is not there any more: then
        all of it is to be read anew. After a ``StoreFault``, too."""
        number, until = self._mark(step)
        if number != self._at[0] or until < self._at[1]:
            return False
        for push in self._withdrawn:
            self._applier.take(push)
        self._go_to(step, until)
        return True

    def _go_to(self, step: int, until: int) -> None:
        number, begin = self._at
        replay(read_records(self._folder.log(number), until, begin), self.tables, self._applier)
        self._at = (number, until)
        self._withdrawn = self._applier.withdraw(step)
        if self._contents.in_step and self._applier.step != step:
            raise StoreFault(
                f"{self._folder.path} was to hold the tables of step {step}, and what it holds leads to "
                f"{self._applier.step}"
            )


def tables_at(path: Path, step: int) -> dict[str, Table]:
    """The tables of a folder as of a step that was marked, for reading; the folder may be in use. ``StoreFault`` if it
    does not hold them."""
    return Followed(path, step).tables
