"""Random histories: whatever joins, dies, freezes, leaves, is cut off or comes late, what must hold holds."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.membership import Origin
from tests.membership.simulator import play

NUM_HISTORIES = 10_000


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.integers(0, 120))
def test_any_history_ends_with_every_step_stored(random, num_events):
    cluster = play(random, num_events)
    assert max(cluster.truth.store) == cluster.rules.total_steps


def test_ten_thousand_histories_end_with_every_step_stored(capsys):
    seen = Counter()
    for seed in range(NUM_HISTORIES):
        random = Random(seed)
        cluster = play(random, random.randint(10, 300))
        worlds = cluster.truth.records.values()
        seen["histories"] += 1
        seen["generations"] += len(worlds)
        seen["coordinators replaced"] += len(cluster.coordinators) - 1
        seen["copies from a peer"] += sum(len(world.sources) for world in worlds)
        seen["restarts from the store"] += sum(world.origin is Origin.STORE for world in worlds)
        seen["moves of lanes to the faster"] += cluster.num_balanced
        seen["workers dismissed"] += sum(worker.dismissed for worker in cluster.workers.values())
    with capsys.disabled():
        print(", ".join(f"{count} {what}" for what, count in seen.items()))
    assert seen["histories"] == NUM_HISTORIES
    assert min(seen.values()) > 300, "histories so tame show nothing"
