"""The job of ``tabled``, with the strategy that ``TABLED_STRATEGY`` names, and ``TABLED_DURABILITY``."""

from __future__ import annotations

import dataclasses
import os

import shoal
from tests.runs.tabled import job as tabled

STRATEGIES = {
    "hybrid": shoal.Hybrid(shards=2),
    "sync": shoal.ParameterServer(shoal.Sync(), shards=2, round_steps=4),
    "async": shoal.ParameterServer(shoal.Async(), shards=2, round_steps=4),
}

strategy = dataclasses.replace(
    STRATEGIES[os.environ.get("TABLED_STRATEGY", "hybrid")], durability=os.environ.get("TABLED_DURABILITY", "log")
)
job = dataclasses.replace(tabled, strategy=strategy)
