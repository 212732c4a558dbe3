from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from shoal.errors import ConfigError
from shoal.strategies import Agreed, AllReduce, Share
from shoal.strategies.buckets import Packing
from tests.strategies.threads import on_ranks

SMALL = AllReduce(bucket_bytes=1024)
INPUTS = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
UNEVEN = [slice(0, 7), slice(7, 8), slice(8, 12)]
NONE_FOR_ONE = [slice(0, 0), slice(0, 9), slice(9, 12)]


class Net(nn.Module):
    """A layer used twice, one that only some batches use, one that none does, and one tied to another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 40)
        self.twice = nn.Linear(40, 40)
        self.sometimes = nn.Linear(40, 40)
        self.never = nn.Linear(40, 40)
        self.last = nn.Linear(40, 3)
        self.tied = nn.Linear(40, 3)
        self.tied.weight = self.last.weight

    def forward(self, inputs, sometimes):
        hidden = self.first(inputs)
        hidden = self.twice(torch.tanh(self.twice(torch.tanh(hidden))))
        hidden = hidden + self.sometimes(hidden) if sometimes else hidden
        return self.last(hidden) + self.tied(hidden)


torch.manual_seed(0)
NET = Net().double()


def net():
    """The same model for every rank; threads share torch's random state."""
    return copy.deepcopy(NET)


def loss_of(model, rows, sometimes=False):
    return nn.functional.mse_loss(model(INPUTS[rows], sometimes), TARGETS[rows])


def step_on(group, model, reducer, rows, *, pieces=1, sometimes=False, lr=0.1):
    """One SGD step among the group's members, each with its own rows in so many backwards."""
    num_rows = len(range(12)[rows])
    reducer.begin(group)
    if num_rows:
        parts = torch.arange(12)[rows].tensor_split(pieces)
        for index, part in enumerate(parts):
            if index == len(parts) - 1:
                reducer.arm()
            (loss_of(model, part, sometimes) * (len(part) / 12)).backward()
    reducer.launch(Share(num_rows / 12, leads=rows.start == 0 and num_rows > 0))
    agreed = reducer.finish()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    reducer.apply(agreed, optimizer.step)
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def plain_gradients(model, parts, sometimes=()):
    for index, rows in enumerate(parts):
        num_rows = len(range(12)[rows])
        if num_rows:
            (loss_of(model, rows, index in sometimes) * (num_rows / 12)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def agree(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] is None) == (other[name] is None), name
        if one[name] is not None:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("parts", [[slice(0, 12)], [slice(0, 5), slice(5, 12)], UNEVEN, NONE_FOR_ONE])
def test_shares_of_any_size_give_the_plain_loops_gradient(parts, pieces):
    def act(group):
        model = net()
        return step_on(group, model, SMALL.bind(model), parts[group.seat.rank], pieces=pieces)

    expected = plain_gradients(net(), [slice(0, 12)])
    for gradients in on_ranks(len(parts), act):
        agree(gradients, expected)


def test_a_parameter_that_one_worker_used_has_its_gradient_on_all():
    def act(group):
        model, rank = net(), group.seat.rank
        return step_on(group, model, SMALL.bind(model), UNEVEN[rank], sometimes=rank == 1)

    expected = plain_gradients(net(), UNEVEN, sometimes={1})
    assert expected["sometimes.weight"] is not None and expected["never.weight"] is None
    for gradients in on_ranks(3, act):
        agree(gradients, expected)


def test_the_workers_hold_the_same_bits_after_many_steps():
    def act(group):
        model = net()
        reducer = SMALL.bind(model)
        for step in range(5):
            step_on(group, model, reducer, UNEVEN[group.seat.rank], sometimes=step % 2 == group.seat.rank)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    first, *others = on_ranks(3, act)
    assert all(torch.equal(first, other) for other in others)


def test_buckets_go_out_in_one_order_whatever_each_worker_computes():
    def act(group):
        model, rank = net(), group.seat.rank
        step_on(group, model, SMALL.bind(model), NONE_FOR_ONE[rank], sometimes=rank == 2)
        return group.sent

    first, *others = on_ranks(3, act)
    assert len(first) > 5 and all(sent == first for sent in others)


def test_the_size_of_buckets_does_not_show_in_the_result():
    def act_with(strategy):
        def act(group):
            model = net()
            return step_on(group, model, strategy.bind(model), UNEVEN[group.seat.rank])

        return act

    small, large = (on_ranks(3, act_with(strategy))[0] for strategy in (SMALL, AllReduce()))
    agree(small, large)


def test_a_worker_alone_sends_nothing():
    def act(group):
        model = net()
        step_on(group, model, SMALL.bind(model), slice(0, 12))
        return group.sent

    assert on_ranks(1, act) == [[]]


def test_a_worker_goes_from_many_to_alone_and_back():
    reducers = {}

    def act(group):
        model, reducer = reducers.setdefault(group.seat.rank, (lambda m: (m, SMALL.bind(m)))(net()))
        parts = [slice(0, 12)] if group.seat.world_size == 1 else [slice(0, 5), slice(5, 12)]
        return step_on(group, model, reducer, parts[group.seat.rank], lr=0.0)

    expected = plain_gradients(net(), [slice(0, 12)])
    for world_size in (2, 1, 2):
        for gradients in on_ranks(world_size, act):
            agree(gradients, expected)


def test_a_step_that_was_not_committed_leaves_no_gradient_behind():
    def act(group):
        model = net()
        reducer = SMALL.bind(model)
        reducer.begin(group)
        loss_of(model, slice(0, 12)).backward()
        reducer.roll_back()
        return step_on(group, model, reducer, UNEVEN[group.seat.rank])

    expected = plain_gradients(net(), [slice(0, 12)])
    for gradients in on_ranks(3, act):
        agree(gradients, expected)


def test_what_was_agreed_can_be_kept_and_applied_later():
    """As a member does that heals: it replays what the others committed."""

    def act(group):
        model, late = net(), net()
        reducer, behind = SMALL.bind(model), SMALL.bind(late)
        behind.begin(group)
        reducer.begin(group)
        reducer.arm()
        (loss_of(model, UNEVEN[group.seat.rank]) * (len(range(12)[UNEVEN[group.seat.rank]]) / 12)).backward()
        reducer.launch(Share(1 / 3, leads=False))
        agreed = reducer.finish()
        kept = agreed.copy()
        for one, result in ((reducer, agreed), (behind, kept)):
            target = model if one is reducer else late
            one.apply(result, torch.optim.SGD(target.parameters(), lr=0.1).step)
        return [torch.equal(p, q) for p, q in zip(model.parameters(), late.parameters(), strict=True)]

    assert all(all(same) for same in on_ranks(3, act))


# Buffers


class Counting(nn.Module):
    """Buffers that show whose forward they saw."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.tensor([1.0, 1.0]))
        self.register_buffer("count", torch.tensor(10))

    def see(self, value):
        with torch.no_grad():
            self.mean += value
            self.count += 1
        return self.weight.sum() * value


def buffers_after(group, fractions, leader, *, commit=True):
    model, rank = Counting(), group.seat.rank
    reducer = SMALL.bind(model)
    reducer.begin(group)
    reducer.arm()
    if fractions[rank]:
        model.see(float(rank + 1)).backward()
    reducer.launch(Share(fractions[rank], leads=rank == leader))
    agreed = reducer.finish()
    if commit:
        reducer.apply(agreed, lambda: None)
    reducer.roll_back()
    return model.mean.tolist(), model.count.item()


def test_statistics_become_the_mean_by_samples_and_counts_the_leaders():
    results = on_ranks(3, lambda group: buffers_after(group, [0.5, 0.25, 0.25], leader=0))
    assert results == [([1 + 0.5 * 1 + 0.25 * 2 + 0.25 * 3] * 2, 11)] * 3


def test_a_worker_without_samples_changes_no_statistics():
    results = on_ranks(2, lambda group: buffers_after(group, [0.0, 1.0], leader=1))
    assert results == [([3.0, 3.0], 11)] * 2


def test_statistics_of_a_step_that_was_not_committed_are_rolled_back():
    results = on_ranks(2, lambda group: buffers_after(group, [0.5, 0.5], leader=0, commit=False))
    assert results == [([1.0, 1.0], 10)] * 2


def test_alone_the_statistics_are_those_that_forward_left():
    assert on_ranks(1, lambda group: buffers_after(group, [1.0], leader=0)) == [([2.0, 2.0], 11)]


def test_a_model_with_nothing_to_train_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        AllReduce().bind(model)


def test_small_parameters_travel_with_a_large_one():
    sizes = {"a": 1000, "b": 10, "c": 2000, "d": 300, "e": 5, "f": 100, "g": 100}  # times 4 bytes; g is sent first
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(size)) for name, size in sizes.items()})
    layouts = Packing(2048).lay_out(model)
    assert ["".join(name[-1] for name in layout.names) for layout in layouts] == ["gfed", "c", "ba"]
    assert [layout.num_entries for layout in layouts] == [505, 2000, 1010]


def test_buckets_too_small_to_be_meant_are_refused():
    with pytest.raises(ConfigError, match="at least 1024"):
        AllReduce(bucket_bytes=1023)


@pytest.mark.parametrize(
    ("values", "finite"),
    [([6e4, 6e4], True), ([1.0, float("inf")], False), ([float("nan")], False), ([float("inf"), float("-inf")], False)],
)
def test_gradients_that_are_no_numbers_are_seen_and_large_ones_in_half_precision_pass(values, finite):
    flat = torch.tensor(values, dtype=torch.float16)
    assert Agreed([torch.ones(3), flat], []).is_finite() is finite


def test_no_gradient_at_all_is_finite():
    assert Agreed([], []).is_finite()
