"""The number of workers is no part of the result: one equals the plain loop, many equal one up to the order of sums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shoal
from shoal.testing import plain_loop
from tests.runs.classing import (
    Classify,
    ClassifyInGroups,
    Experts,
    adam,
    dropping,
    make_job,
    normalised,
    warming,
    wide_enough_for_threads,
)

DOUBLE = Classify(dtype=torch.float64)
QUIET = shoal.TrainOptions(quiet=True)


def trained(job: shoal.Job, workers: int) -> tuple[nn.Module, list[float]]:
    """The model and every step's loss."""
    run = shoal.train(job, workers=workers, options=QUIET)
    progress = [event for event in run.events if event["kind"] == "progress"]
    assert [event["step"] for event in progress] == list(range(1, len(progress) + 1))
    return shoal.load_model(run, job=job), [event["loss"] for event in progress]


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def is_same_to_the_bit(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module", name="usual")
def _usual() -> tuple[shoal.Job, nn.Module, list[float]]:
    """A job, and what the plain loop makes of it."""
    job = make_job(DOUBLE, clip_norm=0.5, schedule=warming)
    return job, *plain_loop(job)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_any_number_of_workers_has_the_losses_of_the_plain_loop(usual, workers):
    job, plain_model, plain_losses = usual
    model, losses = trained(job, workers)
    assert len(losses) == 200 and losses == pytest.approx(plain_losses, rel=0, abs=1e-10)
    assert largest_difference(model, plain_model) < 1e-10


@pytest.mark.parametrize("body", [normalised, dropping])
def test_one_worker_is_the_plain_loop_to_the_bit(body):
    job = make_job(Classify(body), optimizer=adam, clip_norm=0.5, schedule=warming, steps=100)
    model, losses = trained(job, 1)
    plain_model, plain_losses = plain_loop(job)
    assert is_same_to_the_bit(model, plain_model)
    assert losses == pytest.approx(plain_losses, rel=1e-15)


PECULIAR = {
    "shares are unequal": make_job(DOUBLE, steps=50, num_lanes=5),
    "some workers have no samples": make_job(DOUBLE, steps=50, global_batch=2),
    "batches are computed in parts": make_job(DOUBLE, steps=50, micro_batch=4),
    "buckets are many and small": make_job(DOUBLE, steps=50, strategy=shoal.AllReduce(bucket_bytes=1024)),
    "parameters are unused at times": make_job(Classify(Experts, torch.float64), steps=50, global_batch=10),
    "parameters are in groups": make_job(ClassifyInGroups(dtype=torch.float64), steps=50, schedule=warming),
}


@pytest.mark.parametrize("job", PECULIAR.values(), ids=PECULIAR.keys())
def test_three_workers_are_the_plain_loop_even_if(job):
    model, losses = trained(job, 3)
    plain_model, plain_losses = plain_loop(job)
    assert losses == pytest.approx(plain_losses, rel=0, abs=1e-10)
    assert largest_difference(model, plain_model) < 1e-10


def test_a_parameter_that_no_sample_uses_stays_as_it_was():
    job = make_job(Classify(Experts), steps=20)
    model, _ = trained(job, 2)
    torch.manual_seed(job.seed)
    assert torch.equal(model.none.weight, job.task.model().none.weight)


def test_bfloat16_learns_as_the_plain_loop_does_under_autocast():
    job = make_job(precision="bf16", steps=60)
    model, losses = trained(job, 2)
    plain_model, plain_losses = plain_loop(job)
    assert losses == pytest.approx(plain_losses, abs=0.02) and losses[-1] < 0.6 * losses[0]
    assert largest_difference(model, plain_model) < 0.05
    assert largest_difference(model, plain_loop(make_job(steps=60))[0]) > 0


def test_running_statistics_are_the_mean_over_the_workers():
    job = make_job(Classify(normalised), steps=1)
    model, _ = trained(job, 2)
    plain_model, _ = plain_loop(job)
    assert torch.equal(model[1].num_batches_tracked, plain_model[1].num_batches_tracked)
    assert torch.allclose(model[1].running_mean, plain_model[1].running_mean, atol=1e-6)


def test_dropout_draws_the_same_at_the_same_number_of_workers():
    job = make_job(Classify(dropping), steps=30)
    first, again, other = trained(job, 3)[0], trained(job, 3)[0], trained(job, 2)[0]
    assert is_same_to_the_bit(first, again)
    assert largest_difference(first, other) > 1e-6


def test_a_job_from_python_trains_after_torch_has_used_many_threads():
    torch.set_num_threads(2)
    torch.ones(1 << 22).exp().sum()
    torch.set_num_threads(1)
    job = make_job(Classify(wide_enough_for_threads), steps=2, global_batch=500, num_threads=None)
    assert shoal.train(job, options=QUIET).outcome == "done"


def test_many_threads_need_a_job_file():
    with pytest.raises(shoal.ConfigError, match="num_threads=2 needs a job file"):
        shoal.train(make_job(num_threads=2), options=QUIET)
