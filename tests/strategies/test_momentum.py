"""The outer optimizer under a schedule: momentum is that of gradients, whatever the learning rate has become."""

from __future__ import annotations

import pytest
import torch

from shoal.optim import Nesterov


@pytest.mark.parametrize("rates", [(0.1, 0.1, 0.1), (0.1, 0.05, 0.01), (0.01, 0.1, 0.2)], ids=["flat", "down", "up"])
def test_a_round_of_one_step_is_sgd_with_nesterov_momentum_under_the_same_schedule(rates):
    gradients = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(torch.ones(7))
    plain = torch.optim.SGD([parameter], lr=1.0, momentum=0.8, nesterov=True)
    outer, ours, before = Nesterov(lr=1.0, momentum=0.8), torch.ones(7), rates[0]
    state = outer.init(ours)
    for rate, gradient in zip(rates, gradients, strict=True):
        plain.param_groups[0]["lr"] = rate
        parameter.grad = gradient.clone()
        plain.step()
        ours, state = outer.update(ours, rate * gradient, state, rate / before)
        before = rate
    torch.testing.assert_close(ours, parameter.detach())
