"""What a gate makes of how a candidate answers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np

from shoal.rollout import Policy
from shoal.service.gate import looked_at
from shoal.serving.answering import Answer, Served
from shoal.serving.batching import Expired
from shoal.serving.datatypes import Arrays
from shoal.serving.package import Probe


class Late:
    """A release that comes to no request in its time."""

    served = Served("late", 1, (), ())
    held = SimpleNamespace(probe=Probe())

    async def ask(self, inputs: Arrays, timeout_s: float) -> Answer:
        raise Expired("the model did not come to this request in its time")


def test_a_replayed_request_that_is_not_answered_in_time_has_failed():
    recent = [{"number": np.array([1.0], np.float32)}]
    checks, _ = asyncio.run(looked_at(Late(), None, Policy(), recent))  # type: ignore[arg-type]
    (wrong,) = [check for check in checks if not check.is_met]
    assert str(wrong) == "replay: 1 of 1 requests failed: the model did not come to this request in its time"
