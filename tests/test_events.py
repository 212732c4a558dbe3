from __future__ import annotations

import os

from shoal.events import EventLog, read_events


def test_what_is_appended_is_read_in_order_and_once(tmp_path):
    log = EventLog(tmp_path / "events")
    log.append({"kind": "one", "at_s": 1.5})
    first, offset = read_events(log.path)
    log.append({"kind": "two", "text": "line\nbreak"})
    second, end = read_events(log.path, offset)
    log.close()
    assert first == [{"kind": "one", "at_s": 1.5}] and second == [{"kind": "two", "text": "line\nbreak"}]
    assert read_events(log.path, end) == ([], end)


def test_a_torn_last_line_waits_for_its_end(tmp_path):
    path = tmp_path / "events"
    path.write_bytes(b'{"kind":"one"}\n{"kind":"tw')
    events, offset = read_events(path)
    assert events == [{"kind": "one"}]
    path.write_bytes(path.read_bytes() + b'o"}\n')
    assert read_events(path, offset)[0] == [{"kind": "two"}]


def test_a_line_that_is_no_event_is_passed_over(tmp_path):
    (tmp_path / "events").write_bytes(b'{"kind":"one"}\nrubbish\n{"kind":"two"}\n')
    assert [event["kind"] for event in read_events(tmp_path / "events")[0]] == ["one", "two"]


def test_a_log_that_is_not_there_yet_has_no_events(tmp_path):
    assert read_events(tmp_path / "events", 7) == ([], 7)


def test_a_log_goes_on_where_it_ended(tmp_path):
    for kind in ("one", "two"):
        log = EventLog(tmp_path / "events")
        log.append({"kind": kind})
        log.close()
    assert [event["kind"] for event in read_events(tmp_path / "events")[0]] == ["one", "two"]


def test_a_disk_that_takes_nothing_loses_the_event_and_counts_it(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "events")
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(log, "_fd", full)
    log.append({"kind": "lost"})
    log.close()
    assert log.num_lost == 1


def test_an_event_after_a_torn_one_is_not_swallowed_with_it(tmp_path):
    """A process was killed, or its disk filled, in the middle of a line."""
    (tmp_path / "events").write_bytes(b'{"kind":"one"}\n{"ki')
    log = EventLog(tmp_path / "events")
    log.append({"kind": "two"})
    log.close()
    assert [event["kind"] for event in read_events(tmp_path / "events")[0]] == ["one", "two"]


def test_an_event_that_was_half_written_is_counted_and_ended(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "events")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    log.append({"kind": "half"})
    monkeypatch.undo()
    log.append({"kind": "whole"})
    log.close()
    assert log.num_lost == 1 and [event["kind"] for event in read_events(log.path)[0]] == ["whole"]
