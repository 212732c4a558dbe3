"""What holds of the hook for DistributedDataParallel, over real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import nn

import shoal
from shoal.codecs import Cast, Chain, Int4, Int8, OneBit, PowerSGD, RandomK, TopK
from shoal.comm.ddp import ddp_hook, exchange_bucket
from shoal.errors import ConfigError, Fault
from tests.comm.ddp_crew import WIDTH, Crossed, crew, results, trained, wrapped

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_ddp_hook.py"
SIZE = sum(p.numel() for p in Crossed().parameters())
EVERY = [
    None, Cast("bf16"), Cast("fp16"), Int8(), Int8(stochastic=True), Int4(), OneBit(), TopK(100), RandomK(100),
    PowerSGD(2), Chain(TopK(100), Int8()),
]  # fmt: skip
LEARNING = [Int8(), OneBit(), TopK(SIZE // 4)]
WHOLE = [None, TopK(SIZE), RandomK(SIZE)]
WAYS = [{"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}]


# Together


def train_every(line):
    return [trained(codec, 3) for codec in EVERY]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_end_with_the_same_bits(world_size, tmp_path):
    first, *others = results(world_size, train_every, tmp_path)
    for other in others:
        for codec, (mine, _), (theirs, _) in zip(EVERY, first, other, strict=True):
            assert torch.equal(mine, theirs), codec
    assert all(torch.isfinite(parameters).all() for parameters, _ in first)


def train_whole(line):
    return trained(None, 5, hooked=False)[0], [trained(codec, 5)[0] for codec in WHOLE]


def test_sending_every_entry_is_plain_ddp(tmp_path):
    plain, (none, *every) = results(2, train_whole, tmp_path)[0]
    assert torch.equal(none, plain)
    for parameters in every:
        torch.testing.assert_close(parameters, plain)


def train_long(line):
    return trained(None, 30, hooked=False)[1], [trained(codec, 30)[1] for codec in LEARNING]


def test_compressed_training_learns_as_much_as_plain_ddp(tmp_path):
    plain, compressed = results(2, train_long, tmp_path)[0]
    learnt = plain[:5].mean() - plain[-5:].mean()
    assert learnt > 0.3
    for codec, losses in zip(LEARNING, compressed, strict=True):
        assert losses[:5].mean() - losses[-5:].mean() > 0.9 * learnt, codec


def train_in_ways(line):
    return [trained(Int8(), 4, **options)[0] for options in WAYS]


def test_it_goes_with_the_ways_of_ddp(tmp_path):
    first, second = results(2, train_in_ways, tmp_path)
    for options, mine, theirs in zip(WAYS, first, second, strict=True):
        torch.testing.assert_close(mine, first[0], rtol=0.1, atol=0.01)
        assert torch.equal(mine, theirs), options


def half_precision(line):
    model, _, _ = wrapped(nn.Linear(64, 64).bfloat16(), OneBit())
    model(torch.ones(2, 64, dtype=torch.bfloat16)).sum().backward()
    return model.module.weight.grad


def test_half_precision_goes_in_and_comes_out(tmp_path):
    assert all(torch.equal(grad, torch.full((64, 64), 2).bfloat16()) for grad in results(2, half_precision, tmp_path))


def alone(line):
    return trained(OneBit(), 3)[0], trained(None, 3, hooked=False)[0]


def test_alone_nothing_is_lost(tmp_path):
    compressed, plain = results(1, alone, tmp_path)[0]
    assert torch.equal(compressed, plain)


def test_the_example_runs_under_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.split()[-1]) > 0.8, ran.stdout


# What was not sent


def weights(step):
    """This rank's gradients of ``Crossed``, whatever its parameters."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return {name: torch.randn(p.shape, generator=generator) for name, p in Crossed().named_parameters()}


class Given(Crossed):
    """A model whose gradients are given."""

    def forward(self, gradients):
        backwards = ["third.weight", "first.weight", "second.weight", "third.bias", "first.bias", "second.bias"]
        parameters, total = dict(self.named_parameters()), torch.zeros(())
        for name in backwards:
            total = total + (parameters[name] * gradients[name]).sum()
        return total


def flat_of(tensors):
    return torch.cat([tensors[name].flatten() for name, _ in Crossed().named_parameters()])


def passes(model, steps):
    """What came out of the passes, summed."""
    total = torch.zeros(SIZE)
    for step in steps:
        model.zero_grad()
        model(weights(step)).backward()
        total += flat_of({name: p.grad for name, p in model.module.named_parameters()})
    return total


def residual_of(state):
    found = {name.removeprefix("residual/"): t for name, t in state.items() if name.startswith("residual/")}
    return flat_of(found)


def account(line):
    """What came out, what is left and what was put in, on a way with a rebuild and a checkpoint; the buckets seen."""
    model, state, seen = wrapped(Given(), TopK(200))
    came_out = passes(model, range(3))
    saved = save(state.state_dict())
    model, state, _ = wrapped(Given(), TopK(200))
    state.load_state_dict(load(saved))
    came_out += passes(model, range(3, 6))
    put_in = sum(flat_of(weights(step)) for step in range(6)) / dist.get_world_size()
    return came_out, residual_of(state.state_dict()), put_in, seen


def test_what_did_not_come_out_is_in_the_residuals_of_rebuilt_buckets_and_of_checkpoints(tmp_path):
    ranks = results(2, account, tmp_path)
    seen = ranks[0][3]
    assert set(seen[: len(seen) // 3]) != set(seen[-(len(seen) // 3) :]), "the buckets were not rebuilt"
    left, put_in = sum(rank[1] for rank in ranks), sum(rank[2] for rank in ranks)
    assert left.norm() > 1
    torch.testing.assert_close(ranks[0][0] + left, put_in, rtol=1e-4, atol=1e-4)


def steps_of(model, steps):
    grads = []
    for step in steps:
        model.zero_grad()
        inputs = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(inputs).square().sum().backward()
        grads.append(model.module.weight.grad.clone())
    return grads


def resume(line):
    torch.manual_seed(0)
    layer, found = nn.Linear(WIDTH, WIDTH, bias=False), []
    for codec in (OneBit(), RandomK(100), PowerSGD(2)):
        model, state, _ = wrapped(layer, codec)
        whole = steps_of(model, range(6))
        model, state, _ = wrapped(layer, codec)
        begun = steps_of(model, range(3))
        other, other_state, _ = wrapped(layer, codec)
        other_state.load_state_dict(load(save(state.state_dict())))
        found.append((whole, begun + steps_of(other, range(3, 6))))
    return found


def test_resumed_passes_are_those_that_never_stopped(tmp_path):
    for whole, resumed in results(2, resume, tmp_path)[1]:
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def skip_one(line):
    model, state, _ = wrapped(Given(), OneBit())
    passes(model, range(2))
    before = residual_of(state.state_dict())
    gradients = weights(2)
    for gradient in gradients.values():
        gradient[0] = float("inf") if dist.get_rank() else 0.0
    model.zero_grad()
    model(gradients).backward()
    is_seen = not all(p.grad.isfinite().all() for p in model.parameters())
    return is_seen, torch.equal(residual_of(state.state_dict()), before)


def test_a_gradient_that_is_not_finite_shows_on_all_ranks_and_leaves_the_residual(tmp_path):
    assert results(2, skip_one, tmp_path) == [(True, True)] * 2


# What goes wrong


def two_passes():
    """A model after those before which DistributedDataParallel has collectives of its own."""
    model, _, _ = wrapped(Crossed(), OneBit())
    for _ in range(2):
        model(torch.ones(4, 6)).sum().backward()
    return model


def lose_a_peer(line):
    model = two_passes()
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    model(torch.ones(4, 6)).sum().backward()


def test_a_killed_peer_ends_the_loop_with_a_fault(tmp_path):
    with crew(3, lose_a_peer, tmp_path) as group:
        for rank in (0, 1):
            error = group.says(rank, "raised")
            assert isinstance(error, Fault)
            assert error.rank == rank
            assert "collective failed" in str(error)


def wait_in_vain(line):
    model = two_passes()
    if dist.get_rank() == 1:
        return line.recv()
    return model(torch.ones(4, 6)).sum().backward()


def test_a_peer_that_does_nothing_ends_the_loop_when_the_groups_time_is_over(tmp_path):
    with crew(2, wait_in_vain, tmp_path, timeout_s=5.0) as group:
        assert isinstance(group.says(0, "raised"), Fault)
        group.lines[1].send("enough")


def of_another_opinion(line):
    model, _, _ = wrapped(Crossed(), TopK(10 + dist.get_rank()))
    model(torch.ones(4, 6)).sum().backward()


def test_ranks_with_other_codecs_are_told_so(tmp_path):
    with crew(2, of_another_opinion, tmp_path) as group:
        for rank in range(2):
            error = group.says(rank, "raised")
            assert isinstance(error, ConfigError)
            assert "TopK(k=10" in str(error)
            assert "TopK(k=11" in str(error)


def of_another_model(line):
    model, _, _ = wrapped(Crossed(), None, hooked=False)
    model.register_comm_hook(*ddp_hook(Crossed(), Int8()))
    model(torch.ones(4, 6)).sum().backward()


def of_another_type(line):
    layer = nn.Linear(6, 3)
    state, hook = ddp_hook(layer, Int8())
    layer.double()
    model, _, _ = wrapped(layer, None, hooked=False)
    model.register_comm_hook(state, hook)
    model(torch.ones(4, 6, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize(("act", "word"), [(of_another_model, "give it this one"), (of_another_type, "float64")])
def test_the_hook_refuses_what_it_was_not_made_for(act, word, tmp_path):
    with crew(2, act, tmp_path) as group:
        for rank in range(2):
            error = group.says(rank, "raised")
            assert isinstance(error, ConfigError)
            assert word in str(error)


@pytest.mark.parametrize(
    ("model", "codec", "word"),
    [
        (nn.Linear(3, 3).double(), Int8(), "float64"),
        (nn.Linear(3, 3), TopK(13), "smaller k"),
        (nn.Linear(3, 3), "int8", "codec such as"),
        (nn.ReLU(), Int8(), "has none"),
    ],
)
def test_what_cannot_be_is_refused_at_once(model, codec, word):
    with pytest.raises(ConfigError, match=word):
        shoal.ddp_hook(model, codec)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"residual/weight": torch.zeros(8)}, "8 entries"),
        ({"residual/stranger": torch.zeros(9)}, "stranger"),
        ({"optimizer": torch.zeros(9)}, "another's"),
        ({"num_passes": None}, "num_passes"),
    ],
)
def test_a_state_of_something_else_is_refused(change, word):
    state, hook = shoal.ddp_hook(nn.Linear(3, 3), OneBit())
    assert hook is exchange_bucket
    changed = {name: tensor for name, tensor in {**state.state_dict(), **change}.items() if tensor is not None}
    with pytest.raises(ConfigError, match=word):
        state.load_state_dict(changed)


def load_late(line):
    model, state, _ = wrapped(Crossed(), OneBit())
    model(torch.ones(4, 6)).sum().backward()
    state.load_state_dict(state.state_dict())


def test_a_state_that_comes_late_is_refused(tmp_path):
    with crew(1, load_late, tmp_path) as group:
        assert "before the first backward pass" in str(group.says(0, "raised"))
