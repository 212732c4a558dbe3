"""Real labs: hosts that talk at the rates that were asked for, and faults that are real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from shoal.errors import ConfigError
from shoal.lab import Lab, LabSpec, discard, labs, why_not
from shoal.lab.plan import bridge, expected_payload_rate, namespace

pytestmark = pytest.mark.cluster

NAME = f"t{os.getpid()}"[-10:]
"""Another process that runs these tests has another."""
PATIENCE_S = 60.0
BUSY = "import time; t = time.monotonic() + 0.6; n = 0\nwhile time.monotonic() < t: n += 1\nprint(time.process_time())"


@pytest.fixture(autouse=True)
def _has_the_right() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(LabSpec(hosts=3, link=["50mbit", "2=5mbit/20mbit"])) as made:
        yield made


def is_there(name: str) -> bool:
    return any(
        subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0
        for words in (["link", "show", "dev", bridge(name)], ["netns", "pids", namespace(name, 0)])
    )


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@pytest.mark.alone
def test_links_have_the_rates_that_were_asked_for_in_each_direction(lab):
    for sender, receiver, rate in ((0, 1, 50e6), (2, 0, 5e6), (0, 2, 20e6)):
        assert lab.measure(sender, receiver) == pytest.approx(expected_payload_rate(rate), rel=0.05)


def test_a_host_has_its_address_and_reaches_the_others_and_this_machine(lab):
    ask = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).getsockname()[0])"
    with socket.create_server((lab.address, 0)) as listening:
        words = [sys.executable, "-c", ask, lab.address, str(listening.getsockname()[1])]
        ran = lab.hosts[1].run(words, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == lab.hosts[1].address


def test_bytes_are_counted_at_the_link(lab):
    before = lab.bytes(0)
    lab.measure(0, 1, duration_s=0.3)
    sent, received = (now - then for now, then in zip(lab.bytes(0), before, strict=True))
    assert sent > 50e6 / 8 * 0.25
    assert received < sent / 10


@pytest.mark.alone
def test_a_slowed_link_is_slow_until_it_is_told_otherwise(lab):
    lab.slow(0, "5mbit")
    assert lab.measure(0, 1) == pytest.approx(expected_payload_rate(5e6), rel=0.1)
    lab.slow(0)
    assert lab.measure(0, 1) == pytest.approx(expected_payload_rate(50e6), rel=0.05)


def test_a_cut_host_is_reached_by_none_and_goes_on_and_heals(lab):
    child = lab.hosts[1].popen(["sleep", "1000"])
    lab.cut(1)
    with pytest.raises(ConfigError, match="cut off"):
        lab.measure(0, 1)
    assert child.poll() is None
    lab.heal(1)
    assert lab.measure(0, 1) > 0


def test_hosts_that_are_set_apart_reach_all_but_each_other(lab):
    lab.part(0, 1)
    assert lab.measure(0, 2, duration_s=0.2) > 0
    with pytest.raises(ConfigError, match="h0 does not reach h1"):
        lab.measure(0, 1)


def test_a_killed_host_has_no_process_left_and_takes_new_ones(lab):
    children = [lab.hosts[1].popen(["sleep", "1000"]) for _ in range(3)]
    other = lab.hosts[0].popen(["sleep", "1000"])
    assert lab.kill(1) == 3
    assert [child.wait(PATIENCE_S) for child in children] == [-signal.SIGKILL] * 3
    assert other.poll() is None
    assert lab.hosts[1].run(["true"], check=False).returncode == 0


def test_a_frozen_host_stands_still_until_it_thaws(lab):
    child = lab.hosts[1].popen(["sleep", "1000"])
    assert lab.freeze(1) == 1
    assert state(child.pid) == "T"
    lab.thaw(1)
    deadline_s = time.monotonic() + PATIENCE_S
    while state(child.pid) == "T":
        assert time.monotonic() < deadline_s
    assert lab.kill(1) == 1


@pytest.mark.alone
def test_a_share_of_processor_can_be_changed_while_a_host_works(lab):
    def seconds_of_work() -> float:
        return float(lab.hosts[0].run([sys.executable, "-c", BUSY], capture_output=True, text=True, check=True).stdout)

    if lab.record.hosts[0].group is None:
        pytest.skip("needs a cgroup that limits the processor")
    lab.cpu(0, 0.2)
    assert seconds_of_work() < 0.35
    lab.cpu(0, None)


def test_nothing_is_left_of_a_lab_that_was_taken_down():
    with Lab(LabSpec(hosts=2, name=NAME)) as lab:
        child = lab.hosts[0].popen(["sleep", "1000"])
        assert is_there(NAME)
    assert child.wait(PATIENCE_S) == -signal.SIGKILL
    assert not is_there(NAME)
    assert not [record for record in labs() if record.name == NAME]


def test_an_exception_takes_the_lab_down():
    with pytest.raises(ZeroDivisionError), Lab(LabSpec(hosts=1, name=NAME)):
        raise ZeroDivisionError
    assert not is_there(NAME)


def test_a_name_in_use_is_refused_and_the_lab_that_has_it_stays(lab):
    with pytest.raises(ConfigError, match=f"there is a lab '{lab.name}' already, by process {os.getpid()}"):
        Lab(LabSpec(hosts=1, name=lab.name)).up()
    assert is_there(lab.name)


HOLDING = """
import sys, time
from shoal.lab import Lab, LabSpec
with Lab(LabSpec(hosts=2, name=sys.argv[1])) as lab:
    lab.hosts[0].popen(["sleep", "1000"])
    print("up", flush=True)
    time.sleep(1000)
"""


def held_by_another_process() -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLDING, NAME], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_takes_the_lab_down(number):
    with held_by_another_process() as child:
        child.send_signal(number)
        assert child.wait(PATIENCE_S) != 0
    assert not is_there(NAME)


def test_a_lab_that_a_process_holds_is_taken_down_by_that_process():
    with held_by_another_process() as child:
        discard(NAME)
        assert child.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert not is_there(NAME)


def test_what_a_crash_left_over_is_named_and_can_be_cleared():
    with held_by_another_process() as child:
        child.kill()
    assert is_there(NAME)
    assert [record.is_left_over for record in labs() if record.name == NAME] == [True]
    with pytest.raises(ConfigError, match=f"shoal lab down {NAME}"):
        Lab(LabSpec(hosts=1, name=NAME)).up()
    discard(NAME)
    assert not is_there(NAME)
    with Lab(LabSpec(hosts=1, name=NAME)):
        assert is_there(NAME)


@pytest.mark.alone
def test_a_delayed_host_is_heard_later_and_suffers_as_the_others_do():
    with Lab(LabSpec(hosts=2, delay="0=20ms")) as lab:
        ping = "import socket, sys, time\nt = time.monotonic()\ntry: socket.create_connection((sys.argv[1], 9), 5)\n"
        ping += "except ConnectionRefusedError: print(time.monotonic() - t)"
        words = [sys.executable, "-c", ping, lab.hosts[0].address]
        times_s = [float(lab.hosts[1].run(words, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
        assert 0.02 <= min(times_s) < 0.05
        lab.cut(0)
        with pytest.raises(ConfigError, match="cut off"):
            lab.measure(1, 0)
        lab.heal(0)
        lab.slow(0, "5mbit")
        assert lab.measure(0, 1) == pytest.approx(expected_payload_rate(5e6), rel=0.1)
