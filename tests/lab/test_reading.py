"""What is read from the kernel, and from records."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shoal.errors import ConfigError, Fault
from shoal.lab import cgroups, kernel, records
from shoal.lab.records import HostRecord, LabRecord, Process
from shoal.lab.relay import Held

COUNTERS = """Inter-|   Receive                                        |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:     100    1    0    0    0     0          0         0      200    2    0    0    0     0       0          0
labo10:19893126   99    0    0    0     0          0         0 13798978   77    0    0    0     0       0          0
"""

V1 = "cgroup {root} cgroup rw,relatime,cpu 0 0\n"


@pytest.fixture(autouse=True)
def _own_records(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def record(name: str, owner: Process | None = None) -> LabRecord:
    return LabRecord(name=name, subnet="10.83.0.0/24", hosts=(HostRecord("1mbit", 0.0),), owner=owner)


def write(one: LabRecord) -> None:
    with records.locked():
        records.write(one)


def test_bytes_are_read_from_the_kernels_table():
    assert kernel.counters("labo10", COUNTERS) == (19893126, 13798978)


def test_an_interface_that_is_not_there_has_no_counters():
    with pytest.raises(Fault, match="labo1"):
        kernel.counters("labo1", COUNTERS)


def test_a_lab_is_known_from_its_record_until_that_is_removed():
    write(record("one"))
    write(record("two"))
    assert records.read_all() == [record("one"), record("two")]
    records.hosts_path("one").write_text("{}")
    records.remove("one")
    assert records.read_all() == [record("two")]


def test_a_lab_that_is_taken_down_while_all_are_read_is_passed_over():
    write(record("one"))
    records.path_of("gone").symlink_to("nowhere")  # in the listing, and not there to be read
    assert records.read_all() == [record("one")]


def test_a_lab_that_nobody_made_is_not_found():
    with pytest.raises(ConfigError, match="shoal lab status"):
        records.read("none")


def test_a_damaged_record_is_no_record():
    write(record("bad"))
    records.path_of("bad").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json is no record"):
        records.read("bad")


def test_a_lab_is_left_over_once_its_owner_has_ended():
    own = Process.of(os.getpid())
    assert not record("mine", own).is_left_over
    assert not record("stays").is_left_over
    assert record("others", Process(own.pid, own.started - 1)).is_left_over, "a later process of the same number"


def test_a_link_with_a_delay_keeps_order_and_is_never_early():
    held = Held(0.5)
    held.put(b"one", 10.0)
    held.put(b"two", 10.2)
    assert held.due(10.4) is None and held.wait_s(10.4) == pytest.approx(0.1)
    assert [held.due(10.5), held.due(10.5), held.due(10.7), held.due(10.7)] == [b"one", None, b"two", None]
    assert held.wait_s(11.0) is None and held.num_bytes == 0


def test_shares_of_processor_are_cgroups_of_either_version(tmp_path):
    assert cgroups.find("proc /proc proc rw 0 0\n") is None
    assert cgroups.find(V1.format(root=tmp_path)) == cgroups.Groups(tmp_path, 1)
    second = tmp_path / "second"
    second.mkdir()
    (second / "cgroup.controllers").write_text("cpu io")
    (second / "cgroup.subtree_control").write_text("cpu io")
    found = cgroups.find(f"cgroup2 {second} cgroup2 rw 0 0\n")
    assert found == cgroups.Groups(second, 2)


def test_a_share_is_so_much_of_every_period(tmp_path: Path):
    cgroups.limit(tmp_path, 0.5)
    assert (tmp_path / "cpu.cfs_quota_us").read_text() == "10000"
    assert cgroups.limited_to(tmp_path) == 0.5
    cgroups.limit(tmp_path, None)
    assert cgroups.limited_to(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000")
    cgroups.limit(tmp_path, 1.5)
    assert (tmp_path / "cpu.max").read_text() == "30000 20000"
    assert cgroups.limited_to(tmp_path) == 1.5


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
def test_a_group_that_is_removed_while_it_is_read_has_no_limit(tmp_path, monkeypatch, number):
    def is_gone(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    (tmp_path / "cpu.max").touch()
    monkeypatch.setattr(Path, "read_text", is_gone)
    assert cgroups.limited_to(tmp_path) is None
