"""A log keeps what it has taken, whatever is torn off its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import ConfigError, StoreFault
from shoal.tables.log import MAGIC, Log

BODIES = [b"one", b"2" * 1000, bytes(range(256)), b"\x00"]


HEAD_BYTES = 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Log(tmp_path / "log") as log:
        for body in BODIES:
            log.append(body)
    return tmp_path / "log"


def test_what_was_appended_is_read_again(path):
    with Log(path) as log:
        assert list(log.records()) == BODIES and log.torn is None
        log.append(b"in ", memoryview(b"parts"))
        log.flush()
        assert list(log.records()) == [*BODIES, b"in parts"]
        assert log.num_bytes == path.stat().st_size


def test_wherever_it_is_torn_the_whole_records_count(path):
    whole = path.read_bytes()
    ends = [len(MAGIC)]
    for body in BODIES:
        ends.append(ends[-1] + HEAD_BYTES + len(body))
    for length in range(len(MAGIC), len(whole)):
        path.write_bytes(whole[:length])
        kept = sum(end <= length for end in ends) - 1
        with Log(path) as log:
            assert list(log.records()) == BODIES[:kept]
            assert (log.torn is None) == (length in ends)
            if log.torn is not None:
                assert (log.torn.at, log.torn.num_bytes) == (ends[kept], length - ends[kept])
            log.append(b"after")
        with Log(path) as log:
            assert list(log.records()) == [*BODIES[:kept], b"after"] and log.torn is None


@pytest.mark.parametrize("length", range(len(MAGIC)))
def test_a_log_that_was_torn_in_its_first_line_is_a_new_one(path, length):
    path.write_bytes(MAGIC[:length])
    with Log(path) as log:
        assert list(log.records()) == []
    assert path.read_bytes() == MAGIC


def test_a_record_that_was_altered_is_not_taken_for_one(path):
    altered = bytearray(path.read_bytes())
    altered[len(MAGIC) + HEAD_BYTES + 3 + HEAD_BYTES + 500] ^= 1
    path.write_bytes(altered)
    with Log(path) as log:
        assert list(log.records()) == BODIES[:1]
        assert log.torn is not None and log.torn.reason == "a record's sum is wrong"


def test_a_length_that_lies_is_not_believed(path):
    with path.open("ab") as file:
        file.write(b"\xff\xff\xff\x7f" + bytes(8))
    with Log(path) as log:
        assert list(log.records()) == BODIES and log.torn is not None


def test_a_cleared_log_begins_anew(path):
    with Log(path) as log:
        log.clear()
        log.append(b"new")
        assert list(log.records()) == [b"new"]
    assert path.stat().st_size == len(MAGIC) + HEAD_BYTES + 3


def test_another_file_is_not_written_over(tmp_path):
    (tmp_path / "notes").write_text("not a log")
    with pytest.raises(ConfigError, match="is no log"):
        Log(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "not a log"
    with pytest.raises(StoreFault, match="cannot be opened"):
        Log(tmp_path / "nowhere" / "log")


def test_an_empty_record_is_refused(path):
    with Log(path) as log, pytest.raises(ConfigError, match="from 1 to"):
        log.append(b"")


def test_a_full_disk_refuses_a_record_and_keeps_those_before(small_disk):
    with Log(small_disk("1m") / "log") as log:
        log.append(b"x" * 900_000)
        with pytest.raises(StoreFault, match="No space left on device; free some of its disk"):
            log.append(b"y" * 900_000)
        log.append(b"z" * 1000)
        assert [len(body) for body in log.records()] == [900_000, 1000]
