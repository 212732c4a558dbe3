"""Lanes move from slow hosts to fast ones, soon, no further than that helps, and never for noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from shoal.membership.balance import Balance, Cost, Hysteresis, Pace, consider, paces_of, share_out

EVERY_S = 0.5
USUAL = Hysteresis()


@dataclass
class Host:
    """What a step costs here: so much a lane, so much besides, and the link."""

    lane_s: float = 1.0
    fixed_s: float = 0.0
    link_s: float = 0.0

    def compute_s(self, num_lanes: int) -> float:
        return self.fixed_s + num_lanes * self.lane_s


@dataclass
class Hosts:
    """Hosts that are measured twice a second, and whose lanes go where ``consider`` says.

    ``exchanges_together``: no one's exchange ends before that over the slowest link does.
    ``memory`` is how much of a figure is left after each measure: workers tell averages over about a second.
    """

    by_name: dict[str, Host]
    num_lanes: int = 64
    exchanges_together: bool = False
    noise: float = 0.0
    memory: float = 0.6
    random: Random = field(default_factory=lambda: Random(0))
    balance: Balance = field(default_factory=Balance)
    now_s: float = 0.0
    moved_at_s: list[float] = field(default_factory=list)
    averages: dict[str, Cost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shares = share_out(dict.fromkeys(self.by_name, Pace(1.0)), {}, self.num_lanes)

    def measure(self) -> None:
        self.now_s += EVERY_S
        for name, host in self.by_name.items():
            share, factor = self.shares[name], 1 + self.random.uniform(-self.noise, self.noise)
            new = Cost(host.compute_s(share) * factor, 2 * share, host.link_s * factor, self.step_s)
            self.averages[name] = mixed(self.averages.get(name, new), new, self.memory)
        self.balance, is_due = consider(self.balance, self.averages, self.now_s, self.shares, USUAL)
        if is_due:
            self.shares = share_out(self.balance.paces, self.shares, self.num_lanes, self.balance.least_lanes)
            self.moved_at_s.append(self.now_s)

    def run(self, duration_s: float) -> Hosts:
        for _ in range(int(duration_s / EVERY_S)):
            self.measure()
        return self

    @property
    def step_s(self) -> float:
        slowest_s = max(host.link_s for host in self.by_name.values())
        return max(
            host.compute_s(self.shares[name]) + (slowest_s if self.exchanges_together else host.link_s)
            for name, host in self.by_name.items()
        )

    @property
    def best_s(self) -> float:
        """The shortest step that whole lanes allow, if links count."""
        paces = {name: Pace(host.lane_s, host.fixed_s + host.link_s) for name, host in self.by_name.items()}
        best = share_out(paces, {}, self.num_lanes)
        return max(paces[name].finish_s(share) for name, share in best.items())


def mixed(old: Cost, new: Cost, memory: float) -> Cost:
    values = [
        memory * was + (1 - memory) * now for was, now in zip(vars(old).values(), vars(new).values(), strict=True)
    ]
    return Cost(*values)


def alike(num_hosts: int, **changed: Host) -> dict[str, Host]:
    return {f"w{i}": Host() for i in range(num_hosts)} | changed


# Shares


def test_all_are_done_at_once_as_nearly_as_whole_lanes_allow():
    shares = share_out({"a": Pace(1.0), "b": Pace(3.0), "c": Pace(1.0), "d": Pace(1.0)}, {}, 64)
    assert shares == {"a": 20, "b": 6, "c": 19, "d": 19}


def test_no_other_shares_are_done_sooner():
    random = Random(1)
    for _ in range(200):
        a, b, c = (Pace(random.uniform(0.5, 5), random.uniform(0, 20)) for _ in range(3))
        others = [
            max(a.finish_s(i), b.finish_s(j), c.finish_s(12 - i - j)) for i in range(1, 11) for j in range(1, 12 - i)
        ]
        shares = share_out({"a": a, "b": b, "c": c}, {}, 12)
        assert max(a.finish_s(shares["a"]), b.finish_s(shares["b"]), c.finish_s(shares["c"])) == min(others)


def test_who_cannot_be_helped_keeps_a_lane():
    assert share_out({"a": Pace(1.0), "b": Pace(1.0, link_s=1000.0)}, {}, 64) == {"a": 63, "b": 1}


def test_with_fewer_lanes_than_workers_the_fastest_have_them():
    assert share_out({"a": Pace(3.0), "b": Pace(1.0), "c": Pace(1.5)}, {}, 2) == {"a": 0, "b": 1, "c": 1}


def test_among_equals_lanes_stay_where_they_are():
    paces = dict.fromkeys("abc", Pace(1.0))
    assert share_out(paces, {"a": 21, "b": 21, "c": 22}, 64) == {"a": 21, "b": 21, "c": 22}


def test_a_newcomer_is_taken_for_as_fast_as_the_others_are_on_average():
    assert paces_of("abc", {"a": Pace(1.0, 4.0), "b": Pace(3.0, 0.0)})["c"] == Pace(1.5, 2.0)


# Moves


def test_a_host_at_a_third_of_its_speed_ends_with_a_third_of_the_lanes_of_the_others():
    hosts = Hosts(alike(4, w3=Host(lane_s=3.0))).run(5)
    assert hosts.shares["w3"] in (6, 7) and hosts.step_s <= 1.05 * hosts.best_s


def test_a_host_that_is_slowed_in_mid_run_is_relieved_within_a_few_seconds():
    hosts = Hosts(alike(4)).run(60)
    assert not hosts.moved_at_s
    hosts.by_name["w1"] = Host(lane_s=3.0)
    assert hosts.run(5).step_s <= 1.05 * hosts.best_s
    assert hosts.moved_at_s[0] <= 62.5


def test_a_host_that_recovers_gets_its_lanes_back_within_a_few_seconds():
    hosts = Hosts(alike(4, w1=Host(lane_s=5.0))).run(60)
    hosts.by_name["w1"] = Host()
    moves = len(hosts.moved_at_s)
    assert hosts.run(6).step_s <= 1.1 * hosts.best_s
    assert hosts.moved_at_s[moves] <= 64


@pytest.mark.parametrize("slowness", [2.0, 3.0, 10.0])
def test_so_it_is_when_every_step_costs_something_whatever_its_samples(slowness):
    usual, slowed = Host(1.0, fixed_s=5.0), Host(slowness, fixed_s=5.0 * slowness)
    hosts = Hosts({"a": usual, "b": usual, "c": usual, "d": slowed}).run(20)
    assert hosts.step_s <= 1.15 * hosts.best_s
    hosts.by_name["d"] = usual
    assert hosts.run(15).step_s <= 1.15 * hosts.best_s


def test_two_slow_hosts_are_both_relieved():
    hosts = Hosts(alike(8, w2=Host(2.0), w5=Host(4.0))).run(8)
    assert hosts.step_s <= 1.1 * hosts.best_s
    assert hosts.shares["w5"] < hosts.shares["w2"] < hosts.shares["w0"]


def test_between_two_workers_lanes_move_by_their_speeds():
    hosts = Hosts(alike(2, w1=Host(3.0))).run(5)
    assert hosts.shares == {"w0": 48, "w1": 16}


def test_a_host_behind_a_slow_link_computes_less():
    hosts = Hosts(alike(4, w3=Host(link_s=10.0))).run(5)
    assert hosts.shares["w3"] in (8, 9) and hosts.step_s <= 1.05 * hosts.best_s


def test_lanes_that_moved_for_a_slow_link_come_back_if_all_wait_for_it_alike():
    hosts = Hosts(alike(4, w3=Host(link_s=40.0)), exchanges_together=True).run(2)
    assert hosts.shares["w3"] == 1
    hosts.run(8)
    assert not hosts.balance.counts_links and hosts.shares["w3"] == 16 and hosts.step_s == 56
    assert len(hosts.run(60).moved_at_s) == 2


def test_a_slow_host_is_relieved_still_when_links_no_longer_count():
    hosts = Hosts(alike(4, w3=Host(link_s=40.0)), exchanges_together=True).run(20)
    hosts.by_name["w1"] = Host(3.0)
    assert hosts.run(8).shares["w1"] in (6, 7) and hosts.shares["w3"] >= 19


def test_a_link_that_is_slow_for_all_moves_nothing():
    assert not Hosts({f"w{i}": Host(link_s=50.0) for i in range(4)}).run(60).moved_at_s


# Hysteresis


@pytest.mark.parametrize("num_hosts", [2, 4, 8, 16])
@pytest.mark.parametrize("noise", [0.15, 0.2])
def test_noise_moves_nothing_in_ten_thousand_draws(num_hosts, noise):
    hosts = Hosts(alike(num_hosts), noise=noise, memory=0.0)
    for _ in range(10_000 // num_hosts):
        hosts.measure()
    assert not hosts.moved_at_s


@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_once_lanes_have_moved_they_stay(noise):
    hosts = Hosts(alike(4, w1=Host(2.5, fixed_s=6.0), w2=Host(1.5, link_s=8.0)), noise=noise, memory=0.0).run(30)
    moves = len(hosts.moved_at_s)
    assert 1 <= moves <= 5
    assert len(hosts.run(600).moved_at_s) <= moves + (1 if noise else 0)


def test_one_spike_moves_nothing():
    hosts = Hosts(alike(4), memory=0.0).run(10)
    for _ in range(20):
        hosts.by_name["w0"] = Host(lane_s=100.0)
        hosts.measure()
        hosts.by_name["w0"] = Host()
        hosts.run(5)
    assert not hosts.moved_at_s


def test_a_small_gain_is_waited_for_longer_than_a_large_one():
    large, small = (Hosts(alike(4, w3=Host(lane_s))).run(60) for lane_s in (4.0, 1.3))
    assert large.moved_at_s[0] < small.moved_at_s[0]


def test_lanes_do_not_move_for_a_gain_that_is_small_beside_the_whole_step():
    costs = {"a": Cost(0.1, 32, step_s=10.0), "b": Cost(0.3, 32, step_s=10.0)}
    balance = Balance()
    for i in range(100):
        balance, is_due = consider(balance, costs, i * EVERY_S, {"a": 32, "b": 32}, USUAL)
        assert not is_due


# What is not known


def test_who_has_computed_nothing_yet_is_taken_for_average_and_tried():
    balance, is_due, costs = Balance(), False, {"a": Cost(1.0, 1), "b": Cost(0.0, 0), "c": Cost(2.0, 1)}
    for i in range(10):
        if not is_due:
            balance, is_due = consider(balance, costs, i * EVERY_S, {"a": 1, "b": 0, "c": 1}, USUAL)
    assert balance.paces["b"].lane_s == pytest.approx(4 / 3)
    assert share_out(balance.paces, {"a": 1, "c": 1}, 2) == {"a": 1, "b": 1, "c": 0}


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -1.0, 0.0])
def test_figures_that_cannot_be_teach_nothing(nonsense):
    costs = dict.fromkeys("ab", Cost(nonsense, 32))
    assert consider(Balance(), costs, 1.0, {"a": 32, "b": 32}, USUAL) == (Balance(), False)


def test_with_a_batch_smaller_than_the_lanes_everyone_keeps_a_sample_a_step():
    balance, is_due, costs = Balance(), False, {"a": Cost(8.0, 8), "b": Cost(800.0, 8)}
    for i in range(10):
        if not is_due:
            balance, is_due = consider(balance, costs, i * EVERY_S, {"a": 32, "b": 32}, USUAL)
    assert share_out(balance.paces, {}, 64, balance.least_lanes)["b"] == 4
