"""An image that was built for real: it answers, is nobody's to change, and ends when it is told to."""

from __future__ import annotations

import faulthandler
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.launch.image import TORCH_INDEX, ImageOptions, write_context
from tests.cluster import containers
from tests.cluster.containers import Container

pytestmark = pytest.mark.cluster

JOB = Path(__file__).parents[1] / "runs" / "line.py"
BASE = "localhost/shoal-base"
URL = "http://127.0.0.1:8080/v2/models/line"
ROWS = {"input": [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]}


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory: pytest.TempPathFactory) -> shoal.Run:
    if reason := containers.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_RUNS", str(folder))
        return shoal.train(JOB, name="run", options=shoal.TrainOptions(quiet=True))


@pytest.fixture(scope="module", name="container")
def _container(run: shoal.Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A server in a container; how long its making took is printed."""
    faulthandler.cancel_dump_traceback_later()  # minutes are not amiss here, and each command has a limit of its own
    folder, settings = tmp_path_factory.mktemp("image"), containers.pip_settings()
    options = ImageOptions(base=BASE, torch_index="" if "find-links" in settings else TORCH_INDEX)
    context = write_context(run.path, folder / "line", options=options)
    with containers.store(tmp_path_factory.mktemp("store")) as held:
        held.base(BASE)
        begun_s = time.monotonic()
        held.build(context.folder, context.tag, settings)
        built_s, bytes_of = time.monotonic() - begun_s, held.size_bytes
        server = containers.start(held, context.tag)
        ready_s = server.until_healthy()
        sizes = f"{bytes_of(context.tag) / 1e9:.2f} GB, of which the base {bytes_of(BASE) / 1e9:.2f}"
        print(f"built in {built_s:.0f} s, {sizes}; ready {ready_s:.1f} s after its start")
        yield server
    shutil.rmtree(folder)


def ask(container: Container) -> Any:
    return json.loads(container.exec("shoal", "predict", URL, "-", stdin=json.dumps(ROWS)))


def test_it_answers_as_the_run_does(container, run):
    here = shoal.predict(run, ROWS)
    assert ask(container)["output"] == [pytest.approx(row) for row in here["output"].tolist()]


def test_it_is_not_roots_and_nothing_in_it_can_be_changed_or_installed(container):
    assert container.exec("id", "-u") == container.exec("id", "-g") == "10001"
    look = "for place in /app /model /opt/shoal /tmp; do touch $place/x 2>/dev/null && echo $place; done; true"
    assert container.exec("sh", "-c", look) == ""
    assert container.exec("sh", "-c", "command -v pip pip3 gcc cc; true") == ""
    assert container.exec("find", "/app", "/model", "-type", "f", "-name", "*.py*") == "/app/line.py"
    # A builder leaves the empty file on which it mounted one.
    left = "find /build /mnt /opt/shoal/lib/*/site-packages/pip -type f -size +0 2>/dev/null; true"
    assert container.exec("sh", "-c", left) == "", "of the first stage only what was installed is in the image"


def test_it_ends_in_order_when_it_is_told_to_and_can_be_started_again(container):
    begun_s = time.monotonic()
    container.store.podman("stop", "--time", "30", container.id)
    assert container.exit_code == 0, "137 is a kill, once 30 seconds are over"
    assert time.monotonic() - begun_s < 30
    container.store.podman("start", container.id)
    container.until_healthy()
    assert len(ask(container)["output"]) == 2


def test_any_user_will_do(container):
    other = containers.start(container.store, "line:16", "--user", "123456:0")
    other.until_healthy()
    assert other.exec("id", "-u") == "123456"
    other.store.podman("rm", "--force", other.id)
