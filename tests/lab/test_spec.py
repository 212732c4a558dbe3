"""What a lab may be asked to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.lab import LabSpec
from shoal.lab.spec import HIGHEST_RATE, LOWEST_RATE, Link, host_number, parse_duration_s, parse_rate, rate_text


@pytest.mark.parametrize(
    ("text", "rate"), [("64kbit", 64_000), ("100mbit", 100_000_000), ("2.5gbit", 2_500_000_000), ("1GBIT", 10**9)]
)
def test_a_rate_is_bits_a_second(text, rate):
    assert parse_rate(text) == rate


@given(st.integers(LOWEST_RATE, HIGHEST_RATE).map(lambda rate: rate // 1000 * 1000))
def test_a_rate_is_written_as_it_is_read(rate):
    assert parse_rate(rate_text(rate)) == rate


@pytest.mark.parametrize("text", ["fast", "100", "100mb", "-1mbit", "0mbit", "1kbit", "200gbit", "", "1e3mbit"])
def test_an_impossible_rate_is_refused_with_what_is_possible(text):
    with pytest.raises(ConfigError, match="rate"):
        parse_rate(text)


def test_a_link_may_differ_by_direction():
    assert Link.parse("10mbit/100mbit") == Link(10_000_000, 100_000_000)
    assert Link.parse("10mbit") == Link(10_000_000, 10_000_000)
    assert Link.parse("none/1mbit") == Link(None, 1_000_000)


@pytest.mark.parametrize("text", ["100mbit", "10mbit/100mbit", "none", "none/1mbit"])
def test_a_link_is_written_as_it_is_read(text):
    assert str(Link.parse(text)) == text


@pytest.mark.parametrize(("text", "duration_s"), [("20ms", 0.02), ("500us", 0.0005), ("1.5s", 1.5), ("0ms", 0)])
def test_a_delay_is_seconds(text, duration_s):
    assert parse_duration_s(text) == pytest.approx(duration_s)


def test_one_text_is_for_all_hosts_and_a_numbered_one_for_one():
    hosts = LabSpec(hosts=3, link=["2=10mbit/50mbit", "100mbit"], delay="1=20ms", cpu=["0.5", "h0=2"]).each()
    assert [str(host.link) for host in hosts] == ["100mbit", "100mbit", "10mbit/50mbit"]
    assert [host.delay_s for host in hosts] == [0.0, 0.02, 0.0]
    assert [host.cores for host in hosts] == [2.0, 0.5, 0.5]


def test_a_share_of_processor_may_be_a_number():
    assert [host.cores for host in LabSpec(hosts=2, cpu=0.33).each()] == [0.33, 0.33]


@pytest.mark.parametrize(
    "wrong",
    [
        {"hosts": 0},
        {"hosts": 201},
        {"hosts": 2, "name": "much-too-long"},
        {"hosts": 2, "name": "Lab"},
        {"hosts": 2, "name": "../x"},
        {"hosts": 2, "link": "2=1mbit"},
        {"hosts": 2, "link": ["1mbit", "2mbit"]},
        {"hosts": 2, "delay": "11s"},
        {"hosts": 2, "delay": "20"},
        {"hosts": 2, "cpu": "0.001"},
        {"hosts": 2, "cpu": "nan"},
        {"hosts": 2, "cpu": "inf"},
    ],
    ids=str,
)
def test_a_lab_that_cannot_be_is_refused_before_anything_is_made(wrong):
    with pytest.raises(ConfigError):
        LabSpec(**wrong)


def test_a_host_goes_by_number_or_name():
    assert host_number("2", 4) == host_number("h2", 4) == 2
    for text in ("4", "h9", "x", "", "-1", "first"):
        with pytest.raises(ConfigError, match="0 to 3"):
            host_number(text, 4)
