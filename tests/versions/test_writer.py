from __future__ import annotations

import threading
from pathlib import Path

from shoal.errors import StoreFault
from shoal.versions import BackgroundWriter, Failed, Manifest, Saved, Snapshot, Versions
from tests.versions.small import Failing, snapshot_at, versions_in

SOON_S = 60.0


class Held(Versions):
    """Versions whose writes wait to be let go."""

    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def write(self, snapshot: Snapshot) -> Manifest:
        self.begun.release()
        self.go.acquire()
        return self._versions.write(snapshot)


def saved(step: int) -> Saved:
    return Saved(step, snapshot_at(step).meta["fingerprint"])


def test_what_is_submitted_is_stored_and_told_once(tmp_path):
    writer = BackgroundWriter(versions_in(tmp_path))
    writer.submit(snapshot_at(1))
    assert writer.drain(SOON_S)
    assert writer.poll() == [saved(1)] and writer.poll() == []
    assert versions_in(tmp_path).newest() == 1
    writer.close()


def test_while_one_is_written_only_the_newest_waits(tmp_path):
    held = Held(versions_in(tmp_path))
    writer = BackgroundWriter(held)
    writer.submit(snapshot_at(1))
    held.begun.acquire()
    for step in (2, 3, 4):
        writer.submit(snapshot_at(step))
    assert writer.poll() == [] and not writer.drain(0)
    held.go.release(2)
    assert writer.drain(SOON_S)
    assert writer.poll() == [saved(1), saved(4)] and versions_in(tmp_path).steps() == [1, 4]
    writer.close()


def test_a_write_that_fails_is_told_and_the_next_is_tried(tmp_path):
    writer = BackgroundWriter(Versions(Failing(str(tmp_path), fails_at=1, done=False)))
    for step in (1, 2):
        writer.submit(snapshot_at(step))
        assert writer.drain(SOON_S)
    failed, stored = writer.poll()
    assert failed == Failed(1, failed.reason) and "was made to fail" in failed.reason and stored == saved(2)
    writer.close()


def test_an_error_that_no_one_foresaw_is_told_too(tmp_path):
    versions = versions_in(tmp_path)
    versions.write = lambda snapshot: 1 // 0  # type: ignore[assignment]
    writer = BackgroundWriter(versions)
    writer.submit(snapshot_at(1))
    assert writer.drain(SOON_S)
    assert [outcome.reason for outcome in writer.poll()] == ["ZeroDivisionError: integer division or modulo by zero"]
    writer.close()


def test_closing_drops_what_waits_and_does_not_wait_for_a_store_that_hangs(tmp_path):
    held = Held(versions_in(tmp_path))
    writer = BackgroundWriter(held)
    writer.submit(snapshot_at(1))
    held.begun.acquire()
    writer.submit(snapshot_at(2))
    writer.close(timeout_s=0)
    held.go.release(2)
    writer.close(SOON_S)
    assert writer.poll() == [saved(1)] and not held.begun.acquire(blocking=False)
    assert sorted(path.name for path in Path(tmp_path, "versions").iterdir()) == ["0000000001"]


def test_a_write_that_its_check_refuses_leaves_nothing(tmp_path):
    def refuse() -> None:
        raise StoreFault("generation 3 has begun without this worker")

    writer = BackgroundWriter(versions_in(tmp_path), refuse)
    writer.submit(snapshot_at(1))
    assert writer.drain(SOON_S)
    assert writer.poll() == [Failed(1, "generation 3 has begun without this worker")]
    assert versions_in(tmp_path).newest() is None
    writer.close()
