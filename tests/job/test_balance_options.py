"""Balance is an option like any other: set by name, checked, and stored with the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.errors import ConfigError
from shoal.job import Job, describe, override
from shoal.job.job import Balance
from shoal.sources import Arrays


class Fit:
    def model(self):
        return torch.nn.Linear(2, 1)

    def loss(self, model, batch):
        return model(batch[0]).square().mean()

    def metrics(self, model, batch):
        return {}


@pytest.fixture
def job():
    data = Arrays(np.zeros((8, 2), np.float32))
    return Job(task=Fit(), train=data, optimizer=torch.optim.SGD, global_batch=4, epochs=1)


def test_lanes_move_unless_that_is_turned_off(job):
    assert job.balance.enabled
    assert not override(job, {"balance.enabled": "false"}).balance.enabled


def test_what_it_resolves_to_is_stored_as_the_coordinator_reads_it(job):
    changed = override(job, {"balance.least_gain": "0.2"})
    assert describe(changed)["balance"] == {"kind": "Balance", "enabled": True, "least_gain": 0.2, "settle_s": 1.5}


@pytest.mark.parametrize("wrong", [{"least_gain": 0.0}, {"least_gain": 1.0}, {"settle_s": 0.0}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"balance.{next(iter(wrong))}"):
        Balance(**wrong)
