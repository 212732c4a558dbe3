from __future__ import annotations

import json
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save

from shoal.errors import Bug, ConfigError, StoreFault, VersionFault
from shoal.versions import Refused, Snapshot, Store, Versions
from shoal.versions.manifest import FileRecord, sealed, to_json
from shoal.versions.tensor_file import from_bytes, to_parts
from tests.versions.small import Failing, snapshot_at, versions_in

FILES = ("model", "optimizer", "manifest")


def same(a: Snapshot, b: Snapshot) -> bool:
    def equal(one: dict, other: dict) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return a.step == b.step and a.meta == b.meta and equal(a.model, b.model) and equal(a.optimizer, b.optimizer)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_what_is_written_is_read(tmp_path, where):
    versions = Versions(Store(str(tmp_path) if where == "folder" else f"memory://{uuid.uuid4().hex}"))
    assert versions.newest() is None and versions.steps() == []
    for step in (0, 10):
        versions.write(snapshot_at(step))
    assert versions.steps() == [0, 10] and versions.newest() == 10
    assert same(versions.read(), snapshot_at(10)) and same(versions.read(0), snapshot_at(0))


def test_a_manifest_tells_what_is_stored(tmp_path):
    snapshot = snapshot_at(7)
    written = versions_in(tmp_path).write(snapshot)
    folder = tmp_path / "versions" / "0000000007"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["step"] == 7 and manifest["fingerprint"] == snapshot.meta["fingerprint"] == written.fingerprint
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors"}
    assert {name: file["size_bytes"] for name, file in manifest["files"].items()} == sizes
    assert {path.name.split("-")[0] for path in folder.iterdir()} == {"model", "optimizer", "manifest.json"}


def test_the_files_are_those_that_safetensors_reads_and_writes(tmp_path):
    tensors = {
        "é": torch.arange(6).view(2, 3).T,
        "b": torch.tensor([True]),
        "c": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "z": torch.tensor([1 + 2j]).conj(),
        "tiny": torch.tensor([1.5]).to(torch.float8_e4m3fn),
    }
    data = b"".join(to_parts(tensors))
    (tmp_path / "f").write_bytes(data)
    for loaded in (load_file(tmp_path / "f"), from_bytes(data, "f")):
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in tensors.items())
    theirs = save({name: tensor.resolve_conj().contiguous() for name, tensor in tensors.items()})
    assert from_bytes(theirs, "f").keys() == tensors.keys() and len(theirs) == len(data)


def test_tensors_are_written_where_they_lie():
    tensor = torch.zeros(1000)
    _, part = to_parts({"t": tensor})
    tensor += 1
    assert bytes(part) == tensor.numpy().tobytes()


def test_a_dtype_that_no_file_can_hold_is_named():
    with pytest.raises(ConfigError, match=r"t is torch\.complex128"):
        to_parts({"t": torch.zeros(1, dtype=torch.complex128)})


def test_a_step_written_again_changes_nothing(tmp_path):
    versions = versions_in(tmp_path)
    first = versions.write(snapshot_at(5))
    assert versions.write(snapshot_at(5)) == first


def test_a_step_cannot_be_written_as_something_else(tmp_path):
    versions = versions_in(tmp_path)
    versions.write(snapshot_at(5))
    with pytest.raises(VersionFault, match="there is one history"):
        versions.write(snapshot_at(5, value=6))
    assert same(versions.read(), snapshot_at(5))


def test_of_two_writers_of_one_step_the_second_is_refused_though_it_began_before(tmp_path):
    late = versions_in(tmp_path)
    late._kept = lambda step: versions_in(tmp_path).write(snapshot_at(step)) and None  # after the late one has looked
    with pytest.raises(VersionFault, match="there is one history"):
        late.write(snapshot_at(5, value=6))
    assert same(versions_in(tmp_path).read(5), snapshot_at(5))


@pytest.mark.parametrize("meta", [{1: 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": dict}])
def test_meta_that_json_would_alter_is_refused(tmp_path, meta):
    snapshot = snapshot_at(1)
    with pytest.raises(ConfigError, match=r"meta of step 1 is not (what )?JSON"):
        versions_in(tmp_path).write(replace(snapshot, meta={**snapshot.meta, **meta}))
    assert versions_in(tmp_path).steps() == []


def test_a_snapshot_needs_a_fingerprint(tmp_path):
    with pytest.raises(Bug, match="fingerprint"):
        versions_in(tmp_path).write(replace(snapshot_at(1), meta={}))


def file_of(root: Path, step: int, kind: str) -> Path:
    (path,) = (root / "versions" / f"{step:010d}").glob(f"{kind}*")
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


HARMS = [(file, harm) for file in FILES for harm in (flip, cut, empty, Path.unlink)]


@pytest.mark.parametrize(("file", "harm"), HARMS)
def test_a_damaged_file_is_named_and_the_version_before_it_offered(tmp_path, file, harm):
    versions = versions_in(tmp_path)
    for step in (1, 2, 3):
        versions.write(snapshot_at(step))
    for step in (2, 3):
        harm(file_of(tmp_path, step, file))
    named = "no version of step 3" if (file, harm) == ("manifest", Path.unlink) else rf"0000000003/{file}\S* is"
    with pytest.raises(VersionFault, match=rf"{named}.*newest good one before it is 1") as caught:
        versions.read(3)
    assert caught.value.step == 3
    snapshot, refused = versions.read_newest_good()
    assert same(snapshot, snapshot_at(1))
    assert [r.step for r in refused] == ([] if "no version" in named else [3, 2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "is of format 2, and this shoal reads 1"),
        ({"step": 4}, "is not of this version"),
        ({"files": {"../../key": FileRecord(sha256="", size_bytes=0)}}, "is not of this version"),
        ({"files": {}}, "is not of this version"),
        ({"fingerprint": "../../../passwd"}, "is not of this version"),
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path, change, says):
    versions = versions_in(tmp_path)
    versions.write(snapshot_at(3))
    changed = msgspec.structs.replace(versions.manifest(3), **change)
    file_of(tmp_path, 3, "manifest").write_bytes(to_json(sealed(changed)))
    with pytest.raises(VersionFault, match=f"{says}.*no good version is before it"):
        versions.read()
    with pytest.raises(VersionFault, match=f"no good version is stored.*{says}"):
        versions.read_newest_good()


def test_a_cursor_that_changed_on_the_disk_is_noticed(tmp_path):
    versions = versions_in(tmp_path)
    versions.write(snapshot_at(3))
    path = file_of(tmp_path, 3, "manifest")
    content = json.loads(path.read_text())
    content["meta"]["cursors"][0] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(VersionFault, match=r"manifest\.json is damaged: its checksum"):
        versions.read()


def test_a_damaged_version_is_written_anew(tmp_path):
    versions = versions_in(tmp_path)
    versions.write(snapshot_at(3))
    flip(file_of(tmp_path, 3, "model"))
    versions.write(snapshot_at(3, value=4))
    assert same(versions.read(), snapshot_at(3, value=4))


def test_a_discarded_version_is_none(tmp_path):
    versions = versions_in(tmp_path)
    for step in (1, 2):
        versions.write(snapshot_at(step))
    versions.discard(2)
    assert versions.newest() == 1 and not (tmp_path / "versions" / "0000000002").exists()


def test_a_version_that_is_not_there_is_told(tmp_path):
    versions = versions_in(tmp_path)
    with pytest.raises(VersionFault, match="no version is stored"):
        versions.read()
    with pytest.raises(VersionFault, match="no good version is stored"):
        versions.read_newest_good()
    versions.write(snapshot_at(1))
    with pytest.raises(VersionFault, match=r"no version of step 9 is stored.*newest good one before it is 1"):
        versions.read(9)


def test_the_newest_and_every_so_many_steps_are_kept(tmp_path):
    versions = versions_in(tmp_path, keep_last=2, keep_every_steps=100)
    for step in range(0, 250, 30):
        versions.write(snapshot_at(step))
    versions.write(snapshot_at(300))
    assert versions.steps() == [0, 240, 300]


def test_what_a_cut_off_write_left_is_removed_unless_it_may_be_under_way(tmp_path):
    for step in (5, 15):
        folder = tmp_path / "versions" / f"{step:010d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    versions = versions_in(tmp_path)
    versions.write(snapshot_at(10))
    assert sorted(p.name for p in (tmp_path / "versions").iterdir()) == ["0000000010", "0000000015"]
    assert versions.steps() == [10]


@pytest.mark.parametrize("done", [False, True])
def test_a_store_that_fails_at_any_operation_leaves_every_version_whole(tmp_path, done):
    for fails_at in range(1000):
        url = str(tmp_path / str(fails_at))
        sound = versions_in(url, keep_last=1)
        for step in (1, 2):
            sound.write(snapshot_at(step))
        failing = Failing(url, fails_at, done=done)
        try:
            Versions(failing, keep_last=1).write(snapshot_at(3))
            told = False
        except StoreFault:
            told = True
        newest, refused = sound.read_newest_good()
        assert refused == [] and any(same(newest, snapshot_at(step)) for step in (2, 3))
        assert told or newest.step == 3
        sound.write(snapshot_at(3))
        sound.write(snapshot_at(4))
        assert sound.steps() == [4] and len(list((Path(url) / "versions").iterdir())) == 1
        if failing.num_operations <= fails_at:
            break
    assert 8 < fails_at < 999


def test_a_retention_rule_keeps_at_least_one(tmp_path):
    for rule in ({"keep_last": 0}, {"keep_every_steps": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            versions_in(tmp_path, **rule)


def test_refused_versions_say_why(tmp_path):
    versions = versions_in(tmp_path)
    for step in (1, 2):
        versions.write(snapshot_at(step))
    file = file_of(tmp_path, 2, "optimizer")
    size = file.stat().st_size
    cut(file)
    reason = f"{file} is {size - 1} bytes, and should be {size}"
    assert versions.read_newest_good()[1] == [Refused(2, reason)]
    assert versions.newest_good() == (versions.manifest(1), [Refused(2, reason)])


def test_whether_versions_are_good_is_found_without_torch(tmp_path):
    written = versions_in(tmp_path).write(snapshot_at(1))
    code = (
        "import sys; from shoal.versions import Store, Versions; good, _ = Versions(Store(sys.argv[1])).newest_good();"
        "print(good.fingerprint); assert 'torch' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    assert told.stdout.strip() == written.fingerprint
