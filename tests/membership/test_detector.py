from __future__ import annotations

import pytest

from shoal.membership.detector import Detector


@pytest.fixture
def detector():
    return Detector(silent_s=1.5, disconnected_s=0.25, stuck_s=60.0)


def test_who_speaks_in_time_is_not_suspected(detector):
    detector.heard("a", 0.0)
    detector.heard("a", 1.4, "compute")
    assert detector.late(2.8) == {}


def test_silence_is_suspected(detector):
    detector.heard("a", 0.0)
    assert detector.late(1.6) == {"a": "silent for 1.6 s"}


def test_an_ended_connection_is_suspected_sooner_unless_it_comes_back(detector):
    detector.heard("a", 0.0)
    detector.disconnected("a", 0.1)
    assert detector.late(0.3) == {}
    assert detector.late(0.4) == {"a": "its connection ended"}
    detector.heard("a", 0.4)
    assert detector.late(0.5) == {}


def test_a_long_step_counts_only_while_others_wait_for_it(detector):
    detector.heard("a", 100.0, "compute", phase_s=61.0)
    assert detector.late(100.0) == {}
    detector.heard("b", 100.0, "wait", phase_s=50.0)
    assert list(detector.late(100.0)) == ["a"]


def test_members_that_all_wait_for_each_other_are_stalled(detector):
    detector.heard("a", 10.0, "wait", phase_s=6.0)
    detector.heard("b", 10.0, "wait", phase_s=4.0)
    assert not detector.stalled(["a", "b"], 5.0, 10.0)
    assert detector.stalled(["a", "b"], 5.0, 11.5)
    assert not detector.stalled(["a"], 5.0, 11.5), "one alone waits for no one"
    assert not detector.stalled(["a", "b", "c"], 5.0, 11.5), "one was never heard of"


def test_who_is_forgotten_is_not_suspected(detector):
    detector.heard("a", 0.0)
    detector.forget("a")
    detector.disconnected("a", 0.0)
    assert detector.late(99.0) == {}
