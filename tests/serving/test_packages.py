"""A package is what was exported, whole and unchanged, or it is refused with the reason; nothing of it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

import shoal
from shoal.errors import ConfigError, ShoalError, StoreFault, VersionFault
from shoal.job.task import TensorSpec
from shoal.serving import tables
from shoal.serving.package import MANIFEST, Description, Manifest, Package, Probe, TaskRecord, read, write
from shoal.serving.packaged import differences, packaged_predictor, probe_of
from shoal.tables import Adagrad, TableSpec
from shoal.tables.table import Table
from tests.serving.scaled import Scaled

WEIGHTS = {"0.weight": torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, 0.0]]), "0.bias": torch.zeros(2)}
ROWS = {"row": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), "times": torch.tensor([2, 3])}
ANSWERS = {"scores": torch.tensor([[2.0, 1.0], [15.0, 0.0]]), "best": torch.tensor([0, 0])}


def package(**changed: object) -> Package:
    description = Description(
        name="scaled", version=7, created_at="2026-11-28T12:00:00+00:00",
        inputs=[TensorSpec("row", "FP32", (-1, 3)), TensorSpec("times", "INT64", (-1,))],
        outputs=[TensorSpec("scores", "FP32", (-1, 2)), TensorSpec("best", "INT64", (-1,))],
        task=TaskRecord(name="Scaled", job_file="scaled.py", revision="5" * 16),
        metrics={"auc": 0.9}, lineage={"run": "a run", "step": 7},
    )  # fmt: skip
    description = msgspec.structs.replace(description, **changed)
    return Package(description=description, tensors=WEIGHTS, probe=Probe(ROWS, ANSWERS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(package(), tmp_path / "scaled-7")
    return tmp_path / "scaled-7"


def test_what_is_read_is_what_was_written(folder):
    found, wrote = read(folder), package()
    assert found.description == wrote.description
    for ours, theirs in ((found.tensors, WEIGHTS), (found.probe.inputs, ROWS), (found.probe.outputs, ANSWERS)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(os.listdir(folder)) == sorted([MANIFEST, *wrote.files()])


def test_the_digest_is_of_the_content_alone(folder, tmp_path):
    assert write(package(), tmp_path / "again").sha256 == read(folder).digest
    assert write(package(version=8), tmp_path / "other").sha256 != read(folder).digest


def changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def of_manifest(change: Callable[[Manifest], Manifest]) -> Callable[[Path], None]:
    """A manifest that says something else, with the checksum of that."""

    def act(folder: Path) -> None:
        told = change(msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest))
        told = msgspec.structs.replace(told, sha256=told.digest())
        (folder / MANIFEST).write_bytes(msgspec.json.encode(told))

    return act


def also(name: str) -> Callable[[Path], None]:
    """A manifest that names one file more, with what that is to hold."""

    def add(told: Manifest) -> Manifest:
        return msgspec.structs.replace(told, files={**told.files, name: told.files["model.json"]})

    return of_manifest(add)


def as_link(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def as_pipe(folder: Path) -> None:
    (folder / "probe.safetensors").unlink()
    os.mkfifo(folder / "probe.safetensors")


def newer(told: bytes) -> bytes:
    return json.dumps({**json.loads(told), "format": 2}).encode()


DAMAGE = {
    "a bit": (changed("model.safetensors", lambda d: d[:-1] + bytes([d[-1] ^ 1])), VersionFault, "tensors is da"),
    "a byte more": (changed("model.safetensors", lambda d: d + b"x"), VersionFault, "were to be there at most"),
    "cut off": (changed("model.json", lambda d: d[:-5]), VersionFault, "model.json is damaged"),
    "a file less": (lambda folder: (folder / "probe.safetensors").unlink(), VersionFault, "is missing"),
    "a file more": (lambda folder: (folder / "run_me.py").write_text("1 / 0"), ConfigError, "holds run_me.py"),
    "a link": (as_link, ConfigError, "is a link"),
    "a pipe": (as_pipe, ConfigError, "is no file"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), ConfigError, "is no model package"),
    "half a manifest": (changed(MANIFEST, lambda d: d[: len(d) // 2]), VersionFault, "is damaged"),
    "an edited manifest": (changed(MANIFEST, lambda d: d.replace(b"9", b"8")), VersionFault, "its checksum is not"),
    "a newer format": (changed(MANIFEST, newer), ConfigError, "is of format 2, and this shoal reads 1"),
    "the folder above": (also("../model.json"), ConfigError, "names '../model.json'"),
    "an absolute path": (also("/etc/passwd"), ConfigError, "names '/etc/passwd'"),
    "two dots": (also(".."), ConfigError, "names '..'"),
    "a hidden file": (also(".profile"), ConfigError, "names '.profile'"),
    "itself": (also(MANIFEST), ConfigError, f"names '{MANIFEST}'"),
    "no model": (of_manifest(lambda told: msgspec.structs.replace(told, files={})), VersionFault, "lacks model.json"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_not_what_was_exported_is_refused(folder, how):
    act, kind, said = DAMAGE[how]
    act(folder)
    with pytest.raises(kind, match=said.replace(".", r"\.")):
        read(folder)


def test_a_description_that_is_none_is_refused(tmp_path):
    write(package(inputs="many"), tmp_path / "odd")
    with pytest.raises(ConfigError, match="does not describe a model"):
        read(tmp_path / "odd")


def test_a_folder_that_is_there_is_not_written_over(folder):
    with pytest.raises(ConfigError, match="is there already"):
        write(package(), folder)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(StoreFault, match="could not be written"):
        write(package(), tmp_path / "a file" / "scaled-7")
    with pytest.raises(StoreFault):
        write(package(), tmp_path / "whole", beside={"no/such/folder": b"x"})
    assert os.listdir(tmp_path) == ["a file"]


# With the task


def test_it_answers_as_it_did(folder):
    served = packaged_predictor(read(folder), Scaled(), "5" * 16)
    assert (served.name, served.version) == ("scaled", 7)
    assert differences(served, read(folder).probe) == {"scores": 0.0, "best": 0.0}


def test_answers_that_differ_are_found(folder):
    served = packaged_predictor(read(folder), Scaled(), "5" * 16)
    with torch.no_grad():
        served.model[0].bias += torch.tensor([0.0, 0.25])
    assert differences(served, read(folder).probe) == pytest.approx({"scores": 0.75, "best": 0.0})


def test_code_of_another_revision_is_refused(folder):
    with pytest.raises(ConfigError, match="the code at hand is of revision 666"):
        packaged_predictor(read(folder), Scaled(), "666")


def test_a_task_that_takes_something_else_is_refused(tmp_path):
    write(package(inputs=[TensorSpec("row", "FP32", (-1, 4)), TensorSpec("times", "INT64", (-1,))]), tmp_path / "wide")
    with pytest.raises(ConfigError, match="the task takes"):
        packaged_predictor(read(tmp_path / "wide"), Scaled(), "5" * 16)


@pytest.mark.parametrize(
    "batch", [{"row": ROWS["row"]}, (ROWS["row"], ROWS["times"]), {**ROWS, "times": torch.ones(2)}]
)
def test_samples_that_do_not_say_what_requests_carry_are_no_probe(folder, batch):
    assert probe_of(packaged_predictor(read(folder), Scaled(), "5" * 16), batch) == Probe()


# Tables


class Rated(Scaled):
    """A user's score from a table."""

    def model(self) -> nn.Module:
        return shoal.Embedding("users", 2, Adagrad(lr=0.1))

    def inputs(self) -> Sequence[TensorSpec]:
        return [TensorSpec("user", "INT64", (-1,))]

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"score": model(inputs["user"])}


def parts() -> list[Table]:
    found = [Table(TableSpec(name="users", dim=2, rule=Adagrad(lr=0.1))) for _ in range(2)]
    for number, table in enumerate(found):
        ids = torch.arange(number, 10, 2).numpy()
        table.push(ids, torch.ones(len(ids), 2).numpy() * (1 + number))
    return found


def rated(tmp_path: Path, name: str = "users") -> Package:
    image = tables.whole(parts())
    meta = image.meta()
    meta["spec"]["name"] = name
    described = package(
        inputs=[TensorSpec("user", "INT64", (-1,))], outputs=[TensorSpec("score", "FP32", (-1, 2))], tables=[meta]
    )
    write(Package(description=described.description, tensors={}, probe=Probe(), tables=[tables.stored(image)]),
          tmp_path / "rated")  # fmt: skip
    return read(tmp_path / "rated")


def test_rows_of_all_shards_come_with_it(tmp_path):
    served = packaged_predictor(rated(tmp_path), Rated(), "5" * 16)
    ids = torch.tensor([0, 1, 8, 9, 1 << 60])
    even, odd = parts()
    wanted = torch.from_numpy(even.pull(ids.numpy()))
    wanted[1::2][:2] = torch.from_numpy(odd.pull(ids.numpy()))[1::2][:2]
    assert torch.equal(served.predict({"user": ids})["score"], wanted)


def test_a_table_that_is_not_there_is_missed(tmp_path):
    with pytest.raises(ShoalError, match="the package has none of that name"):
        packaged_predictor(rated(tmp_path, "items"), Rated(), "5" * 16)
