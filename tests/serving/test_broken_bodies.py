"""Whatever was done to a body, it is answered, and not as a failure. ``benchmarks.fuzz_serving`` has more of them."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import islice

import pytest

from benchmarks.fuzz_serving import Asker, Body, Model, bodies, is_failure, measure
from shoal.serving import Server
from shoal.serving.answering import Alone
from shoal.serving.inference import Face
from tests.serving.calling import answering

NUM_BODIES = 500


def test_every_body_is_answered_and_none_is_the_servers_failure() -> None:
    with Server(Model()) as server, answering(Face(service=Alone(Model()))) as at:
        asker = Asker(int(server.url.rpartition(":")[2]), int(at.rpartition(":")[2]))
        threads = threading.active_count()
        answered = Counter(asker.ask(body) for body in islice(bodies(7), NUM_BODIES))
        assert not [status for status in answered if is_failure(status)], answered
        assert {"200", "400", "OK", "INVALID_ARGUMENT"} <= answered.keys()
        assert threading.active_count() <= threads + 8
        asker.close()


def test_the_same_seed_breaks_the_same() -> None:
    def first(seed: int) -> list[Body]:
        return list(islice(bodies(seed), 50))

    assert first(1) == first(1) != first(2)


@pytest.mark.cluster
def test_a_server_in_a_process_of_its_own_does_not_grow() -> None:
    figures = measure(1_000, seed=2)
    assert figures["is_alive"] and figures["num_failures"] == 0
    assert figures["growth_mb"] < 50
