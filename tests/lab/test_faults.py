"""Files of faults, and faults one by one, before there is a lab."""

from __future__ import annotations

import pytest

from shoal.errors import ConfigError
from shoal.lab.faults import HostFault, one_fault, parse_faults

FILE = """
[[fault]]
at_s = 6
host = "h2"
do = "heal"

[[fault]]
at_s = 3.5
host = 2
do = "cut"

[[fault]]
at_s = 7.0
host = 0
do = "cpu"
to = 0.33
"""


def test_a_file_of_faults_is_read_in_the_order_of_time():
    assert parse_faults(FILE, 4) == (
        HostFault(do="cut", host=2, at_s=3.5),
        HostFault(do="heal", host=2, at_s=6.0),
        HostFault(do="cpu", host=0, to="0.33", at_s=7.0),
    )


def test_no_faults_are_none():
    assert parse_faults("", 4) == ()


def test_a_fault_is_told_in_words():
    assert str(one_fault("slow", "1", "10mbit", 4)) == "slow h1 to 10mbit"
    assert str(one_fault("cut", "h3", None, 4)) == "cut h3"


@pytest.mark.parametrize(
    ("do", "host", "to"),
    [("explode", "1", None), ("cut", "4", None), ("cut", "1", "1mbit"), ("slow", "1", "fast"), ("cpu", "1", "0")],
)
def test_a_fault_that_cannot_be_is_refused(do, host, to):
    with pytest.raises(ConfigError):
        one_fault(do, host, to, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[fault]", "TOML"),
        ("faults = 3", "there is faults"),
        ("fault = 3", "tables"),
        ('[[fault]]\nhost = 1\ndo = "cut"', "fault 1 .*at_s"),
        ('[[fault]]\nat_s = 1\nhost = 1\ndo = "cut"\nwhen = 3', "fault 1 .*when"),
        ('[[fault]]\nat_s = -1\nhost = 1\ndo = "cut"', "fault 1: at_s"),
        ('[[fault]]\nat_s = true\nhost = 1\ndo = "cut"', "fault 1: at_s"),
        ('[[fault]]\nat_s = nan\nhost = 1\ndo = "cut"', "fault 1: at_s"),
        ('[[fault]]\nat_s = 1\nhost = 9\ndo = "cut"', "fault 1: the hosts are 0 to 3"),
        ('[[fault]]\nat_s = 1\nhost = 1\ndo = "cut"\n[[fault]]\nat_s = 1\nhost = 1\ndo = "fly"', "fault 2: .*fly"),
    ],
)
def test_a_wrong_file_says_which_fault_is_wrong(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_faults(text, 4)
