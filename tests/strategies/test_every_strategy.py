"""Laws that tie the strategies to each other and to plain SGD."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from shoal.codecs import Int8, OneBit, PowerSGD, TopK
from shoal.errors import Bug, ConfigError
from shoal.optim import Nesterov, Plain
from shoal.strategies import AllReduce, DiLoCo, LocalSGD, Share
from tests.strategies.threads import on_ranks

NUM_ROWS, NUM_STEPS, WORLD = 24, 6, 3
INPUTS = torch.randn(NUM_STEPS, NUM_ROWS, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(NUM_STEPS, NUM_ROWS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
ROWS = {1: [slice(0, 24)], 2: [slice(0, 8), slice(8, 24)], 3: [slice(0, 12), slice(12, 15), slice(15, 24)]}
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)).double()


def sgd(model, momentum=0.9):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def loss_of(model, step, rows):
    return nn.functional.mse_loss(
        model(INPUTS[step, rows].to(dtype_of(model))), TARGETS[step, rows].to(dtype_of(model))
    )


def dtype_of(model):
    return next(model.parameters()).dtype


def flat(model):
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def plain(num_steps=NUM_STEPS, late=0):
    """The plain loop; ``late``: with the gradients of the parameters of so many updates earlier."""
    model, behind = copy.deepcopy(NET), copy.deepcopy(NET)
    optimizer, history = sgd(model), [copy.deepcopy(NET.state_dict())] * (late + 1)
    for step in range(num_steps):
        behind.load_state_dict(history[-1 - late])
        behind.zero_grad()
        loss_of(behind, step, slice(0, NUM_ROWS)).backward()
        for p, q in zip(model.parameters(), behind.parameters(), strict=True):
            p.grad = q.grad
        optimizer.step()
        history.append(copy.deepcopy(model.state_dict()))
    return flat(model)


@dataclass
class Rank:
    """One worker's loop by hand."""

    group: object
    strategy: object
    dtype: torch.dtype = torch.float64

    def __post_init__(self):
        self.model = copy.deepcopy(NET).to(self.dtype)
        self.optimizer = sgd(self.model)
        self.session = self.strategy.bind(self.model)
        self.rows = ROWS[self.group.seat.world_size][self.group.seat.rank]
        self.share = Share((self.rows.stop - self.rows.start) / NUM_ROWS, leads=self.group.seat.rank == 0)

    def all_reduced(self, num_steps=NUM_STEPS):
        version = 0
        for step in range(num_steps):
            self.session.begin(self.group, step)
            self.session.arm()
            (loss_of(self.model, step, self.rows) * self.share.fraction).backward()
            self.session.launch(self.share)
            if step >= self.session.delay:
                version = self.commit(version)
        while version < num_steps:
            version = self.commit(version)
        return flat(self.model)

    def commit(self, version):
        agreed = self.session.finish()
        self.session.remember(version + 1)
        self.session.apply(agreed, self.optimizer.step)
        return version + 1

    def local_step(self, step):
        self.optimizer.zero_grad()
        loss_of(self.model, step, self.rows).backward()
        self.optimizer.step()

    def in_rounds(self, num_steps=NUM_STEPS, fault=None):
        """``fault``: what comes of it if after the first exchange and what is computed meanwhile all fail, once."""
        every, overlap = self.session.sync_every_steps, self.session.overlap_steps
        ahead = 0
        for target in range(every, num_steps + 1, every):
            for step in range(target - every + ahead, target):
                self.local_step(step)
            ahead = overlap if target < num_steps else 0
            agreed = self.exchange(target, ahead)
            if fault is not None and target == every:
                self.session.roll_back()
                if fault == "given up":
                    self.session.rewind()
                agreed = self.exchange(target, ahead, again=fault == "kept")
            self.session.remember(target)
            self.session.apply(agreed, lambda: None)
        return flat(self.model)

    def exchange(self, target, ahead, again=False):
        self.session.launch(self.group, self.share, target, goes_on=ahead > 0)
        for stage in range(self.session.num_stages):
            self.session.advance(stage + 1)
        for step in range(target, target if again else target + ahead):
            self.local_step(step)
        return self.session.finish()


def trained(strategy, world_size=WORLD, dtype=torch.float64):
    def act(group):
        rank = Rank(group, strategy, dtype)
        return rank.all_reduced() if isinstance(strategy, AllReduce) else rank.in_rounds()

    first, *others = on_ranks(world_size, act)
    assert all(torch.equal(first, other) for other in others)
    return first


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_reduce_is_the_plain_loop(world_size):
    torch.testing.assert_close(trained(AllReduce(), world_size), plain())


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_delay_of_one_is_the_plain_loop_with_gradients_one_update_old(world_size):
    torch.testing.assert_close(trained(AllReduce(delay=1), world_size), plain(late=1))


@pytest.mark.parametrize(
    "strategy", [LocalSGD(sync_every_steps=3), DiLoCo(sync_every_steps=3, outer=Plain())], ids=repr
)
def test_local_steps_of_one_worker_are_the_plain_loop(strategy):
    torch.testing.assert_close(trained(strategy, 1), plain())


def test_averaging_after_every_step_is_all_reduce():
    torch.testing.assert_close(trained(LocalSGD(sync_every_steps=1)), plain())


@pytest.mark.parametrize("fragments", [1, 2, 4])
def test_an_outer_step_of_rate_one_is_averaging_in_whatever_fragments(fragments):
    diloco = DiLoCo(sync_every_steps=3, outer=Nesterov(lr=1.0, momentum=0.0), fragments=fragments)
    torch.testing.assert_close(trained(diloco), trained(LocalSGD(sync_every_steps=3)))


def test_what_is_computed_while_an_exchange_is_under_way_is_kept_on_top_of_it():
    """With one worker the mean is its own, so nothing shows."""
    streaming = DiLoCo(sync_every_steps=3, outer=Plain(), fragments=2, overlap_steps=2)
    torch.testing.assert_close(trained(streaming, 1), plain())


@pytest.mark.parametrize("fault", ["kept", "given up"])
def test_after_a_failed_exchange_what_was_computed_on_top_of_it_is_kept_or_given_up(fault):
    """Where an optimizer has no memory both come to what an undisturbed run does."""

    def act(group, fault=None):
        rank = Rank(group, DiLoCo(sync_every_steps=3, fragments=2, overlap_steps=2))
        rank.optimizer = sgd(rank.model, momentum=0.0)
        return rank.in_rounds(fault=fault)

    disturbed = on_ranks(WORLD, lambda group: act(group, fault))
    assert torch.equal(disturbed[0], on_ranks(WORLD, act)[0])


def test_a_round_is_not_launched_again_from_where_it_did_not_end():
    def act(group):
        rank = Rank(group, DiLoCo(sync_every_steps=3, overlap_steps=2))
        rank.exchange(3, 2)
        rank.session.roll_back()
        with pytest.raises(Bug, match="kept or given up"):
            rank.session.launch(group, rank.share, 3)

    on_ranks(1, act)


@pytest.mark.parametrize(
    "strategy",
    [
        AllReduce(codec=TopK(10_000)),
        AllReduce(codec=TopK(10_000), delay=1),
        LocalSGD(sync_every_steps=3, codec=TopK(10_000)),
    ],
    ids=repr,
)
def test_k_over_n_is_refused_before_training(strategy):
    with pytest.raises(ConfigError, match="10"):
        strategy.bind(copy.deepcopy(NET).float())


def test_a_codec_that_sends_everything_changes_nothing():
    n = sum(p.numel() for p in NET.parameters())
    found = trained(AllReduce(codec=TopK(n)), dtype=torch.float32)
    torch.testing.assert_close(found, trained(AllReduce(), dtype=torch.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codec", [Int8(), OneBit(), PowerSGD(1)], ids=repr)
def test_what_is_to_stay_uncompressed_does(codec):
    found = trained(AllReduce(codec=codec, uncompressed=("*",)), dtype=torch.float32)
    torch.testing.assert_close(found, trained(AllReduce(), dtype=torch.float32), rtol=1e-4, atol=1e-6)


BAD = {
    "delay": (lambda: AllReduce(delay=2), "delay must be 0 or 1"),
    "a codec by name": (lambda: AllReduce(codec="int8"), r"shoal\.Int8\(\)"),
    "two rounds late": (lambda: AllReduce(codec=PowerSGD(), delay=1), "use delay=0 or another codec"),
    "no steps": (lambda: LocalSGD(sync_every_steps=0), "at least 1"),
    "overlap of a whole round": (lambda: DiLoCo(sync_every_steps=4, overlap_steps=4), "less than sync_every_steps"),
    "no fragments": (lambda: DiLoCo(sync_every_steps=4, fragments=0), "fragments must be at least 1"),
    "an outer optimizer of torch's": (lambda: DiLoCo(sync_every_steps=4, outer=torch.optim.SGD), "outer optimizer"),
    "a pattern as a word": (lambda: AllReduce(codec=Int8(), uncompressed="*.bias"), "tuple of patterns"),
    "momentum": (lambda: Nesterov(momentum=1.0), "below 1"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_a_strategy_that_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"uncompressed names 'bias\*'.*0\.weight"):
        AllReduce(codec=Int8(), uncompressed=("bias*",)).bind(copy.deepcopy(NET).float())


def test_a_codec_refuses_double_precision_before_training():
    with pytest.raises(ConfigError, match="float64"):
        AllReduce(codec=Int8()).bind(copy.deepcopy(NET))


# Memories


def residuals(world_size, leaving=()):
    """Each rank's residual before and after levelling, and how many were counted."""

    def act(group):
        rank = Rank(group, AllReduce(codec=OneBit()), torch.float32)
        rank.all_reduced(3)
        memories = rank.session.memories
        before = sum_of(memories.residual())
        count = memories.level(group, active=group.seat.rank not in leaving)
        return before, sum_of(memories.residual()), count

    return on_ranks(world_size, act)


def sum_of(tensors):
    return torch.cat([t.reshape(-1) for t in tensors.values()]).clone() if tensors else torch.zeros(())


def test_levelling_spreads_the_residuals_evenly():
    results = residuals(3)
    total = sum(before for before, _, _ in results)
    for _, after, count in results:
        torch.testing.assert_close(after, total / 3)
        assert count == 3


def test_who_leaves_hands_its_residual_over():
    results = residuals(3, leaving=(1,))
    total = sum(before for before, _, _ in results)
    assert not results[1][1].numel() > 1
    for rank in (0, 2):
        torch.testing.assert_close(results[rank][1], total / 2)


def test_residuals_outlive_a_change_of_the_number_of_workers():
    """What three workers had not sent is sent by the two that are left: the mass is that of the gradients put in."""

    def act(group):
        rank = ranks.setdefault(group.seat.rank, Rank(group, AllReduce(codec=OneBit()), torch.float32))
        session, world = rank.session, group.seat.world_size
        gradient = torch.full((NUM,), float(group.seat.rank + 1))
        session.begin(group, world)
        put(rank.model, gradient)
        session.launch(Share(1 / world, leads=False))
        agreed = [g.clone() for g in session.finish().gradients]
        session.remember(world + 1)
        session.roll_back()
        return agreed[0], sum_of(session.memories.residual())

    ranks: dict[int, Rank] = {}
    first = on_ranks(3, act)
    second = on_ranks(2, act)
    lost = first[2][1].sum()
    put_in = NUM * (1 + 2 + 3 + 1 + 2)
    got = first[0][0].sum() + second[0][0].sum() + sum(left.sum() for _, left in second) + lost
    torch.testing.assert_close(got, torch.tensor(float(put_in)), rtol=1e-3, atol=1e-2)


NUM = sum(p.numel() for p in NET.parameters())


def put(model, gradient):
    """Have backward reach such gradients."""
    sizes = [p.numel() for p in model.parameters()]
    pieces = torch.split(gradient, sizes)
    sum((p * g.view(p.shape)).sum() for p, g in zip(model.parameters(), pieces, strict=True)).backward()
