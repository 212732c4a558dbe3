"""The folder that an image is built from has all that serving needs, pinned, and nothing else."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shoal
from shoal.cli import main
from shoal.errors import ConfigError, Fault
from shoal.job import TensorSpec, hash_job, load_job
from shoal.launch.image import ImageOptions, write_context
from shoal.launch.pins import pins_of
from shoal.serving import make_predictor
from shoal.serving.package import Description, Package, Probe, TaskRecord, write

JOB = """
import torch
import shoal
from imaged_parts.sizes import WIDTH

class Sum:
    def model(self): return torch.nn.Linear(WIDTH, 1)
    def loss(self, model, batch): return model(batch[0]).square().mean()
    def metrics(self, model, batch): return {}
    def inputs(self): return [shoal.TensorSpec("row", "FP32", (-1, WIDTH))]
    def predict(self, model, inputs): return {"sum": model(inputs["row"])}

data = shoal.Arrays(torch.ones(8, WIDTH))
job = shoal.Job(task=Sum(), train=data, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), global_batch=4, epochs=1)
"""
CODE = ("app/imaged_parts/__init__.py", "app/imaged_parts/sizes.py", "app/job of sums.py")
MODEL = ("model/MANIFEST.json", "model/model.json", "model/model.safetensors", "model/probe.safetensors")
BESIDE = (".dockerignore", "Dockerfile", "constraints.txt", "requirements.txt", "shoal-9.9-py3-none-any.whl")


@contextmanager
def job_in(folder: Path) -> Iterator[Path]:
    """A job in two files, beside what is no part of it. What loading it leaves in this process is undone."""
    (folder / "imaged_parts").mkdir(parents=True)
    (folder / "imaged_parts" / "__init__.py").touch()
    (folder / "imaged_parts" / "sizes.py").write_text("WIDTH = 3\n")
    (folder / "job of sums.py").write_text(JOB)
    (folder / ".env").write_text("PASSWORD=a secret")
    (folder / "beside.py").write_text("TOKEN = 'a secret'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield folder / "job of sums.py"
    for name in [name for name in sys.modules if name.startswith(("imaged_parts", "shoal_job"))]:
        del sys.modules[name]


@pytest.fixture
def job_file(tmp_path: Path) -> Iterator[Path]:
    with job_in(tmp_path / "code") as path:
        yield path


@pytest.fixture
def package(tmp_path: Path, job_file: Path) -> Path:
    make_package(tmp_path / "sums-7", job_file)
    return tmp_path / "sums-7"


def make_package(folder: Path, job_file: Path, *, off_by: float = 0.0) -> None:
    """Of a model that adds up; ``off_by``: how far its probe's answers are from that."""
    task = load_job(job_file).task
    tensors, rows = {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}, {"row": torch.tensor([[1.0, 2.0, 4.0]])}
    served = make_predictor(task, tensors, name="Sums $of (rows)", version=7)
    described = Description(
        name=served.name, version=7, created_at="2026-11-28T12:00:00+00:00",
        inputs=[TensorSpec("row", "FP32", (-1, 3))], outputs=list(served.outputs),
        task=TaskRecord(name="Sum", job_file=job_file.name, revision=hash_job(job_file)), metrics={}, lineage={},
    )  # fmt: skip
    answers = {"sum": served.predict(rows)["sum"] + off_by}
    write(Package(description=described, tensors=tensors, probe=Probe(rows, answers)), folder)


def with_a_wheel(folder: Path) -> ImageOptions:
    """With some wheel, since to make one takes seconds."""
    wheel = folder / "shoal-9.9-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    return ImageOptions(wheel=wheel)


@pytest.fixture
def options(tmp_path: Path) -> ImageOptions:
    return with_a_wheel(tmp_path)


@pytest.fixture(scope="module", name="image")
def _image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by someone whose files are nobody else's business."""
    folder = tmp_path_factory.mktemp("image")
    before = os.umask(0o077)
    try:
        with job_in(folder / "code") as job_file:
            make_package(folder / "sums-7", job_file)
            return write_context(
                folder / "sums-7", folder / "image", job_file=job_file, options=with_a_wheel(folder)
            ).folder
    finally:
        os.umask(before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_the_model_the_code_that_counts_the_pins_and_no_secret(image):
    found, package = contents(image), contents(image.parent / "sums-7")
    assert sorted(found) == sorted([*CODE, *MODEL, *BESIDE])
    assert found["app/job of sums.py"].decode() == JOB
    assert {name: found[f"model/{name}"] for name in package} == package
    assert not [name for name, data in found.items() if b"secret" in data or str(Path.home()).encode() in data]


def test_it_is_the_same_each_time(image, job_file, options, tmp_path):
    again = write_context(image.parent / "sums-7", tmp_path / "again", job_file=job_file, options=options).folder
    assert contents(again) == contents(image)


def test_the_user_of_an_image_can_read_it_whoever_made_it(image):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (image, *image.rglob("*"))}
    assert modes == {0o755, 0o644}


def test_the_image_is_not_roots_says_how_it_is_and_hears_signals(image):
    text = (image / "Dockerfile").read_text()
    last = text.rpartition("\nFROM ")[2].replace("\\\n", "")
    told = dict(re.findall(r"^([A-Z]+) +(.+)$", last, re.MULTILINE))
    user = told["USER"].split(":")
    assert all(part.isdecimal() and int(part) > 0 for part in user)
    assert told["EXPOSE"] == "8080" and "http://127.0.0.1:8080/v2/health/ready" in told["HEALTHCHECK"]
    entry = ["shoal", "serve", "/model", "--job", "/app/job of sums.py", "--host", "0.0.0.0", "--port", "8080"]
    assert json.loads(told["ENTRYPOINT"]) == entry
    assert json.loads(told["RUN"]) == ["shoal", "verify", "/model", "--job", "/app/job of sums.py"]
    assert 'title="Sums \\$of (rows)"' in told["LABEL"] and "pip" not in last and "ARG" not in told


def test_only_what_is_copied_goes_to_the_builder(image):
    lines = (image / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*" and kept == {"app", "model", "requirements.txt", "constraints.txt", "*.whl"}


def test_what_serving_needs_is_pinned_as_it_is_here(image):
    pinned = dict(line.split("==") for line in (image / "constraints.txt").read_text().splitlines())
    for name in ("torch", "numpy", "numba", "httptools", "starlette", "h11", "sympy"):
        assert pinned[name] == version(name).partition("+")[0]
    assert not pinned.keys() & {"shoal", "ray", "pytest", "mypy"}
    assert f"torch=={pinned['torch']}" in (image / "Dockerfile").read_text()
    assert (image / "requirements.txt").read_text() == "./shoal-9.9-py3-none-any.whl[serve]\n"


def test_what_the_job_imports_besides_is_installed_too(tmp_path):
    path = tmp_path / "job.py"
    path.write_text("import sklearn.metrics, json, torch\nfrom packaging import version\nimport missing\n")
    (tmp_path / "packaging.py").touch()
    pins = pins_of([path, tmp_path / "packaging.py"], tmp_path)
    assert pins.imported == {"scikit-learn": version("scikit-learn")}
    assert pins.all["scipy"] == version("scipy")


def test_what_was_installed_from_no_index_is_not_asked_of_one(tmp_path, monkeypatch):
    path = tmp_path / "job.py"
    path.write_text("import house_of_mine\n")
    about = tmp_path / "house_of_mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: house_of_mine\nVersion: 1.0\n")
    (about / "top_level.txt").write_text("house_of_mine\n")
    (about / "direct_url.json").write_text('{"url": "file:///a/place", "dir_info": {}}')
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="house-of-mine, which was not installed from an index"):
        pins_of([path], tmp_path)


# What is refused


def refused(*arguments: object) -> Callable[[pytest.CaptureFixture[str]], str]:
    """What the command says of it, with exit code 2."""

    def said(capfd: pytest.CaptureFixture[str]) -> str:
        with pytest.raises(SystemExit) as end:
            main(["docker", *map(str, arguments)])
        assert end.value.code == 2
        return capfd.readouterr().err

    return said


def test_a_package_without_its_code_is_refused(package, capfd):
    assert "give the job file of its task with --job" in refused(package)(capfd)


def test_a_version_of_a_package_is_refused(package, job_file, capfd):
    assert "leave --version out" in refused(package, "--job", job_file, "--version", 7)(capfd)


def test_a_job_file_that_is_not_there_is_refused(package, capfd):
    assert "no.py does not exist" in refused(package, "--job", "no.py")(capfd)


def test_a_run_that_is_not_there_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SHOAL_RUNS", str(tmp_path))
    assert "nowhere" in refused("nowhere")(capfd)


def test_a_folder_that_is_there_is_not_written_over(package, job_file, tmp_path, capfd):
    (tmp_path / "image").mkdir()
    assert "is there already" in refused(package, "--job", job_file, "--to", tmp_path / "image")(capfd)
    assert not contents(tmp_path / "image")


@pytest.mark.parametrize(
    "wrong",
    [
        {"base": "python\nRUN evil"},
        {"base": ""},
        {"torch_index": "https://me:secret@index.example/cpu"},
        {"torch_index": "file:///wheels"},
        {"torch_index": 'https://index.example/" evil'},
        {"wheel": Path("missing.whl")},
    ],
    ids=str,
)
def test_an_option_that_cannot_be_meant_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ConfigError):
        ImageOptions(**wrong)


def test_other_code_is_refused_and_leaves_nothing(package, job_file, options, tmp_path):
    job_file.write_text(JOB + "# changed\n")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match="the code at hand is of revision"):
        write_context(package, tmp_path / "image", job_file=job_file, options=options)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_model_that_answers_otherwise_is_refused(job_file, options, tmp_path):
    make_package(tmp_path / "skewed", job_file, off_by=1.0)
    with pytest.raises(Fault, match="answers otherwise than when it was exported"):
        write_context(tmp_path / "skewed", tmp_path / "image", job_file=job_file, options=options)


def test_code_that_needs_what_is_not_in_the_image_is_refused(job_file, options, tmp_path):
    (job_file.parent / "width.txt").write_text("3")
    job_file.write_text(JOB + "from pathlib import Path\nPath(__file__).with_name('width.txt').read_text()\n")
    make_package(tmp_path / "sums-7", job_file)
    with pytest.raises(ConfigError, match=r"what would be in the image cannot serve: .*width\.txt"):
        write_context(tmp_path / "sums-7", tmp_path / "image", job_file=job_file, options=options)


# From a run, with shoal's own wheel


@pytest.mark.cluster
def test_a_run_is_exported_and_the_commands_to_go_on_are_printed(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SHOAL_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    line = Path(__file__).parents[1] / "runs" / "line.py"
    run = shoal.train(line, name="run", settings=["epochs=1"], options=shoal.TrainOptions(quiet=True))
    with pytest.raises(SystemExit) as end:
        main(["docker", "run", "--base", "registry.example/python:3.12", "--torch-index", "", "--to", "images/it"])
    said = capfd.readouterr()
    assert end.value.code == 0, said.err
    assert said.out.splitlines()[0] == "docker build -t line:8 images/it"
    assert "making a wheel of the shoal in" in said.err
    text = Path("images/it/Dockerfile").read_text()
    assert text.startswith("ARG BASE=registry.example/python:3.12\n") and "ARG TORCH_INDEX_URL=\n" in text
    assert load_file("images/it/model/model.safetensors")
    wheel, *others = Path("images/it").glob("*.whl")
    assert re.fullmatch(r"shoal-[\d.]+-py3-none-any\.whl", wheel.name) and not others
    key = (run.path / "key").read_bytes()
    assert not [name for name, data in contents(Path("images/it")).items() if key in data]
