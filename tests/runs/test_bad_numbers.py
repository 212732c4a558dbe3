"""A loss that is no finite number stops the run at the last good version, and who caused it is named."""

from __future__ import annotations

import pytest
import torch

import shoal
from shoal.lanes import Order
from shoal.launch.using import read_version
from shoal.training.kit import plan_steps
from tests.runs.classing import make_job, points_but

QUIET = shoal.TrainOptions(quiet=True)


def place_of(job: shoal.Job, sample: int) -> tuple[int, int]:
    """The step and the lane that a sample falls to in the first epoch."""
    order, steps = Order(job.train.block_sizes(), job.num_lanes, job.seed, 0), plan_steps(job)
    block_rows = job.train.block_sizes()[0]
    for step in range(steps.steps_per_epoch):
        span = steps.span(step)
        for lane in range(job.num_lanes):
            parts = order.slice(lane, int(span.starts[lane]), int(span.stops[lane]))
            if any(sample - part.block * block_rows in part.rows for part in parts):
                return step, lane
    raise AssertionError(f"sample {sample} is in no step")


@pytest.mark.parametrize(("workers", "sample"), [(1, 123), (2, 123), (3, 700)])
def test_a_sample_that_is_no_number_is_named_by_step_worker_and_lane(workers, sample):
    job = make_job(train=points_but(sample, float("nan")), steps=60)
    step, lane = place_of(job, sample)
    with pytest.raises(
        shoal.ShoalError, match=rf"loss of step {step} is not a finite number \(worker w\d, lane {lane}\)"
    ):
        shoal.train(job, workers=workers, name="run", options=QUIET)
    last = read_version("run")
    assert last.step == step
    assert all(torch.isfinite(tensor).all() for tensor in last.model.values())


def test_the_worker_that_is_named_hosts_the_lane():
    job = make_job(train=points_but(123, float("nan")), steps=60, num_lanes=4)
    step, lane = place_of(job, 123)
    with pytest.raises(shoal.ShoalError, match=rf"step {step} .* \(worker w{lane // 2}, lane {lane}\)"):
        shoal.train(job, workers=2, options=QUIET)


def test_a_bad_sample_that_is_mended_lets_the_run_go_on():
    job = make_job(train=points_but(123, float("nan")), steps=60)
    with pytest.raises(shoal.ShoalError, match="the newest stored version is of step"):
        shoal.train(job, workers=2, name="run", options=QUIET)
    assert shoal.resume("run", job=make_job(steps=60), options=QUIET).outcome == "done"


def test_a_gradient_that_is_no_number_is_not_committed():
    """An infinite feature gives a finite loss, through tanh, and a gradient that is no number."""
    job = make_job(train=points_but(123, float("inf")), steps=60, num_lanes=4)
    step, lane = place_of(job, 123)
    message = rf"gradient of step {step} is not a finite number \(worker w{lane // 2}, lane {lane}\)"
    with pytest.raises(shoal.ShoalError, match=message):
        shoal.train(job, workers=2, name="run", options=QUIET)
    assert read_version("run").step == step


class Spoiling(torch.optim.SGD):
    """Makes a parameter no number, whatever the gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["params"][0].fill_(float("inf"))


def test_parameters_that_are_no_numbers_after_the_last_step_are_not_stored():
    job = make_job(steps=1, optimizer=lambda parameters: Spoiling(parameters, lr=0.1))
    with pytest.raises(shoal.ShoalError, match="after step 1 a parameter is not a finite number"):
        shoal.train(job, workers=2, name="run", options=QUIET)
    with pytest.raises(shoal.VersionFault, match="no version"):
        read_version("run")
