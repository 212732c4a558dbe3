"""Versions on real disks that fill up, by real processes that are killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from shoal.errors import StoreFault
from shoal.versions import Snapshot
from tests.versions.small import snapshot_at, versions_in

_MEGABYTE = 1 << 20
_WRITE_FOR_EVER = """
import sys, torch
from shoal.versions import Snapshot, Store, Versions
versions = Versions(Store(sys.argv[1]), keep_last=2)
for step in range(int(sys.argv[2]), 10**9):
    tensor = torch.full((1 << 20,), float(step))
    versions.write(Snapshot(step, {"w": tensor}, {"w.m": tensor}, {"fingerprint": f"{step:016x}"}))
    print(step, flush=True)
"""


def big(step: int, num_bytes: int) -> Snapshot:
    return Snapshot(step, {"w": torch.full((num_bytes // 4,), float(step))}, {}, {"fingerprint": f"{step:016x}"})


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02])
def test_a_process_killed_while_it_writes_loses_nothing_that_it_had_written(tmp_path, delay_s):
    command = [sys.executable, "-c", _WRITE_FOR_EVER, str(tmp_path), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(3)]
        try:
            process.wait(delay_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        told += [int(line) for line in process.stdout]
    assert process.returncode == -signal.SIGKILL
    versions = versions_in(tmp_path, keep_last=2)
    snapshot, refused = versions.read_newest_good()
    assert refused == [] and told[-1] <= snapshot.step <= told[-1] + 1
    assert torch.equal(snapshot.model["w"], torch.full((_MEGABYTE,), float(snapshot.step)))
    for step in (snapshot.step + 1, snapshot.step + 2):
        versions.write(big(step, 8))
    assert len(list(tmp_path.rglob("*"))) == 1 + 2 * 4  # no drafts, no halves


def test_a_full_disk_leaves_the_last_good_version_and_heals_once_there_is_room(small_disk):
    disk = small_disk("8m")
    versions = versions_in(disk, keep_last=1)
    versions.write(big(1, 2 * _MEGABYTE))
    filler = disk / "filler"
    filler.write_bytes(bytes(5 * _MEGABYTE))
    with pytest.raises(StoreFault, match=r"(?i)^no space left on device: cannot write .*/model-"):
        versions.write(big(2, 2 * _MEGABYTE))
    assert versions.read_newest_good()[0].step == 1
    filler.unlink()
    versions.write(big(3, 2 * _MEGABYTE))
    assert versions.steps() == [3] and len(list((disk / "versions").iterdir())) == 1


def test_a_limit_on_file_size_leaves_the_last_good_version(tmp_path):
    versions = versions_in(tmp_path)
    versions.write(snapshot_at(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MEGABYTE, hard))
    try:
        with pytest.raises(StoreFault, match=r"(?i)^file too large: cannot write .*/model-"):
            versions.write(big(2, 2 * _MEGABYTE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert versions.read().step == 1 and os.listdir(tmp_path / "versions" / "0000000002") == []
