from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from shoal.errors import ConfigError, StoreFault
from shoal.versions.store import Absent, Exists, Store
from tests.versions.racing import winners


@pytest.fixture(params=["folder", "file URL", "memory"], name="store")
def _store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    memory = f"memory://{uuid.uuid4().hex}"
    return Store({"folder": str(tmp_path), "file URL": f"file://{tmp_path}/deep/er", "memory": memory}[request.param])


def test_what_is_put_is_read_and_replaced_and_listed_and_deleted(store):
    store.put("a/b/one", b"12", memoryview(b"34"), b"")
    store.put("a/two", b"")
    assert store.read("a/b/one") == b"1234" and store.read("a/two") == b""
    store.put("a/b/one", b"5")
    assert store.read("a/b/one") == b"5" and store.list("a") == ["b", "two"] and store.list("a/b") == ["one"]
    store.delete("a/b")
    store.delete("a/two")
    assert store.list("a") == [] == store.list("never")


def test_a_name_is_created_once(store):
    store.create("generations/1.json", b"first")
    with pytest.raises(Exists, match=r"generations/1\.json: the name is taken"):
        store.create("generations/1.json", b"second")
    assert store.read("generations/1.json") == b"first" and store.list("generations") == ["1.json"]


def test_what_is_not_there_is_absent_and_may_be_deleted(store):
    with pytest.raises(Absent, match="nothing of that name"):
        store.read("a/b")
    store.delete("a/b")


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/../b", "/etc/passwd", "a//b", ".hidden", "a/", "a\\b", "a\0", "é"]
)
def test_a_name_with_tricks_is_refused(store, name):
    for action in (store.read, store.list, store.delete, lambda n: store.put(n, b""), lambda n: store.create(n, b"")):
        with pytest.raises(ConfigError, match="is no name in a store"):
            action(name)


def test_a_store_that_cannot_keep_one_history_is_refused():
    with pytest.raises(ConfigError, match="cannot keep one history"):
        Store("gs://bucket/run")


def test_an_unwritable_folder_is_told_with_the_systems_reason(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreFault, match=f"(?i)^{os.strerror(errno.ENOTDIR)}: cannot write .*/file/x"):
        Store(str(tmp_path / "file")).put("x", b"")


def test_a_file_system_without_hard_links_is_refused(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ConfigError, match="no hard links"):
        Store(str(tmp_path)).create("a", b"")
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_the_network_repeated_is_ours(tmp_path, monkeypatch):
    link = os.link

    def repeated(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", repeated)
    Store(str(tmp_path)).create("a", b"ours")
    assert (tmp_path / "a").read_bytes() == b"ours"


@pytest.mark.parametrize("verb", ["put", "create"])
def test_what_a_killed_writer_left_beside_a_name_goes_with_the_next_write(tmp_path, verb):
    (tmp_path / f".model.{uuid.uuid4().hex}").write_bytes(b"half")
    other = tmp_path / f".model.safetensors.{uuid.uuid4().hex}"
    other.write_bytes(b"half")
    store = Store(str(tmp_path / ".."))
    assert store.list(tmp_path.name) == []
    getattr(store, verb)(f"{tmp_path.name}/model", b"whole")
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "model"]


@pytest.mark.parametrize("is_told", [False, True])
def test_who_comes_second_and_finds_its_draft_removed_is_told_that_the_name_is_taken(tmp_path, monkeypatch, is_told):
    link = os.link

    def outrun(source: str, target: str) -> None:
        monkeypatch.setattr(os, "link", link)
        Store(str(tmp_path)).create("a", b"first")
        if is_told:
            raise FileExistsError(errno.EEXIST, "File exists")
        link(source, target)

    monkeypatch.setattr(os, "link", outrun)
    with pytest.raises(Exists):
        Store(str(tmp_path)).create("a", b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_of_processes_that_create_one_name_exactly_one_wins(tmp_path):
    won = winners(str(tmp_path), num_racers=3, num_names=100)
    assert won == [(number, (tmp_path / "g" / str(number)).read_bytes()) for number in range(100)]
    assert len(list((tmp_path / "g").iterdir())) == 100


def test_of_threads_that_create_one_name_in_memory_exactly_one_wins():
    url, winners = f"memory://{uuid.uuid4().hex}", []

    def race(number: int) -> None:
        try:
            Store(url).create("g", bytes([number]))
        except Exists:
            return
        winners.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bytes([winner]) for winner in winners] == [Store(url).read("g")]


def test_the_stores_faults_survive_pickling():
    for fault in (Exists("taken", step=3), Absent("gone")):
        copy = pickle.loads(pickle.dumps(fault))
        assert type(copy) is type(fault) and copy.message == fault.message and copy.step == fault.step


def test_the_store_is_imported_without_torch_or_a_file_system_library():
    code = (
        "import sys, shoal.versions.store as s; s.Store('.').list('nothing');"
        "assert not {'torch', 'fsspec', 's3fs', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
