"""How a run stands, in 80 columns."""

from __future__ import annotations

from shoal.launch.progress import shard_table, story, table

PLACE = {"host": "10.77.12.104", "pid": 4194303}
TIMES = {
    "compute_s": 0.1234,
    "encode_s": 0.0041,
    "wire_s": 12.3,
    "wait_s": 0.00004,
    "decode_s": 0.02,
    "sent_bytes": 14.9e6,
}


def test_each_worker_has_a_line_with_its_lanes_and_where_its_time_goes():
    workers = [{"name": "w0", "lanes": 20, **PLACE, **TIMES}, {"name": "w1", "lanes": 4, **PLACE}]
    head, first, second, note = table({"workers": workers})
    assert head.split() == ["worker", "host:pid", "lanes", "compute", "encode", "wire", "wait", "decode", "sent"]
    assert first.split() == ["w0", "10.77.12.104:4194303", "20", "123", "4.1", "12300", "0.0", "20.0", "14.9", "MB"]
    assert second.split() == ["w1", "10.77.12.104:4194303", "4", *"------"]
    assert "ms a step" in note and len(head) == len(first) == len(second) <= 80


def test_before_any_time_is_known_lanes_alone_are_shown():
    assert table({"workers": [{"name": "w0", "lanes": 64, **PLACE}]})[1].split() == ["w0", "10.77.12.104:4194303", "64"]


def test_bytes_are_told_in_three_digits():
    sent = [999.4, 999.6, 999_600, 1.5e9]
    rows = table({"workers": [{"name": "w", "lanes": 1, **PLACE, **TIMES, "sent_bytes": count} for count in sent]})
    assert [" ".join(row.split()[-2:]) for row in rows[1:-1]] == ["999 B", "1 kB", "1 MB", "1.5 GB"]


def test_each_shard_has_a_line_with_what_it_holds_and_how_fast_it_is():
    figures = {"rows": 12_345_678, "bytes": 1.9e9, "hit_rate": 0.731, "waiting": 5, "refused": 0}
    told = {
        "table/users": figures, "table/films": {**figures, "hit_rate": 0.531}, "pull_ms": 0.3111, "push_ms": 12.3,
        "log_bytes": 268e6, "staleness": {"0": 30, "4": 10}, "waiting": 2,
    }  # fmt: skip
    head, first, second = shard_table({"s0": told, "s1": {"waiting": 0}})
    assert head.split() == ["shard", "rows", "size", "found", "pull", "ms", "push", "ms", "log", "stale", "waiting"]
    assert first.split() == ["s0", "24691356", "3.8", "GB", "63", "%", "0.31", "12.30", "268", "MB", "1.0", "2"]
    assert second.split() == ["s1", "0", "0", "B", "-", "-", "-", "-", "-", "0"]
    assert len(head) == len(first) <= 80 and not shard_table({})


def test_a_move_of_lanes_is_told_as_a_sentence():
    event = {"kind": "deal", "reason": "balance", "generation": 1, "lanes": {"w0": 48, "w1": 16}}
    assert story(event) == "lanes move to the faster workers: w0 48, w1 16"
    assert not story({**event, "reason": "healed"})
