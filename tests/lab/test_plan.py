"""How labs are made, as commands: nothing is run."""

from __future__ import annotations

import pytest

from shoal.errors import ConfigError
from shoal.lab import plan
from shoal.lab.spec import LONGEST_NAME, MOST_HOSTS, Link

SUBNET = "10.83.7.0/24"


def test_no_name_is_longer_than_the_kernel_takes():
    lab, last = "x" * LONGEST_NAME, MOST_HOSTS - 1
    assert max(len(name) for name in (plan.bridge(lab), plan.inner(lab, last), plan.outer(lab, last))) <= 15


def test_every_host_and_the_machine_have_addresses_of_their_own():
    addresses = [plan.bridge_address(SUBNET), *(plan.address(SUBNET, n) for n in range(MOST_HOSTS))]
    assert len(set(addresses)) == MOST_HOSTS + 1
    assert addresses[:2] == ["10.83.7.1", "10.83.7.10"]
    assert addresses[-1] == "10.83.7.209"


@pytest.mark.parametrize(
    ("used", "free"),
    [
        ([], "10.83.0.0/24"),
        (["192.0.2.0/24", "10.83.0.5/32"], "10.83.1.0/24"),
        (["10.83.0.0/25", "10.83.1.128/25"], "10.83.2.0/24"),
        (["10.0.0.0/8"], "172.29.0.0/24"),
    ],
)
def test_a_subnet_in_use_is_left_alone(used, free):
    assert plan.free_subnet(used) == free


def test_where_every_subnet_is_in_use_there_can_be_no_lab():
    with pytest.raises(ConfigError, match="free /24"):
        plan.free_subnet(["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"])


def test_each_direction_is_limited_where_it_leaves():
    up, down = plan.shape("lab", 2, Link(10_000_000, 100_000_000))
    assert up[:3] == ("tc", "-n", "labh2") and "labi2" in up and "10000000bit" in up
    assert "labo2" in down and "100000000bit" in down


def test_an_idle_link_may_send_some_ms_at_once_and_at_least_some_frames():
    assert plan.burst_bytes(100_000_000) == 80_000
    assert plan.burst_bytes(64_000) == 4_096


def test_all_that_is_made_is_unmade():
    made = [*plan.make_bridge("lab", SUBNET), *plan.make_namespace("lab", 0), *plan.make_link("lab", 0)]
    added = {command[4] if command[3] == "name" else command[3] for command in made if command[2] == "add"}
    added -= {"10.83.7.1/24"}
    assert added == {"labb", "labh0", "labo0"}
    assert {command[-1] for command in plan.unmake("lab", 1)} == added
