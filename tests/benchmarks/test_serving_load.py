from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.load import Answer, Load, at_a_rate, parse, spacing
from benchmarks.overload import Course, figures_of
from benchmarks.serve import Measured, against_best, goodput
from benchmarks.served_models import KINDS
from benchmarks.servers import PEERS, Server, body, numbers, ours

OIP, JSON, ROWS = PEERS["mlserver"], PEERS["fastapi"], PEERS["bentoml"]


def answers(*statuses: int, took_ms: float = 10.0) -> list[Answer]:
    return [Answer(number, status, round(1e3 * took_ms)) for number, status in enumerate(statuses)]


def rung(requests_per_s: int, p99_ms: float, refused: int = 0) -> Load:
    fine = answers(*[200] * requests_per_s, took_ms=p99_ms)
    return Load.of([*fine, *answers(*[429] * refused, took_ms=1)], 1.0)


def measured(server: Server, *goodputs: int) -> Measured:
    return Measured(server, server.single, rounds=[{1: rung(each, 5)} for each in goodputs])


def test_a_log_that_was_cut_off_is_read_to_its_last_whole_line() -> None:
    assert parse("1000\t200\t50\n2000\t-1\t60\t9\n3000\t20") == [Answer(1000, 200, 50), Answer(2000, -1, 60)]
    assert parse("") == []


def test_latencies_are_of_what_was_answered_and_of_what_was_refused() -> None:
    found = Load.of([*answers(200, 200, took_ms=40), *answers(429, 503, took_ms=2), *answers(500, -1, 0)], 2.0)
    assert (found.p50_ms, found.p99_ms, found.refused_p99_ms) == (40, 40, 2)
    assert found.by_status == {200: 2, 429: 1, 500: 1, 503: 1}
    assert (found.requests_per_s, found.offered_per_s, found.errors) == (1.0, 3.5, 2)


def test_without_an_answer_there_is_no_latency() -> None:
    found = Load.of([], 2.0, unanswered=10)
    assert (found.p50_ms, found.p99_ms, found.refused_p99_ms, found.errors) == (None, None, None, 10)
    assert found.answered_fraction == 0.0


def test_only_what_was_answered_by_its_deadline_is_in_time() -> None:
    found = Load.of([*answers(200, 200, 200, took_ms=100), *answers(200, took_ms=251), *answers(429)], 2.0)
    assert found.within_per_s(250) == 1.5


def test_a_record_is_json_without_the_single_latencies() -> None:
    told: dict[str, Any] = json.loads(json.dumps(rung(3, 5).record()))
    assert "latencies_ms" not in told
    assert told["p99_ms"] == 5


@pytest.mark.parametrize("rate", [0.3, 37, 94, 188, 333, 430, 999, 1500, 2749])
def test_connections_begin_at_the_rate_that_is_wanted(rate: float) -> None:
    at_once, every_ms = spacing(rate)
    assert 1e3 * at_once / every_ms == pytest.approx(rate, rel=0.06 if rate > 30 else 100)
    assert 1 <= at_once <= 8


def test_at_a_rate_only_what_was_sent_once_all_connections_were_there_counts() -> None:
    log = [Answer(1_000 * number, 200, 10) for number in range(3_500)]
    found = at_a_rate(log, 1000, 2.0)
    assert (found.offered_per_s, found.errors) == (1000, 0)


def test_at_a_rate_what_was_due_and_not_answered_is_an_error() -> None:
    log = [Answer(1_000 * number, 200, 10) for number in range(2_000)]
    assert at_a_rate(log, 1000, 2.0).errors == 980
    assert at_a_rate([], 1000, 2.0).errors == 2000


def test_goodput_is_the_most_that_keeps_the_latency() -> None:
    assert goodput({1: rung(100, 9), 16: rung(400, 49), 64: rung(900, 51)}, 50) == 400
    assert goodput({1: rung(100, 51)}, 50) == 0


def test_a_rung_that_refuses_is_no_goodput() -> None:
    assert goodput({1: rung(100, 9), 16: rung(400, 9, refused=40)}, 50) == 100
    assert goodput({16: rung(400, 9, refused=3)}, 50) == 400


def test_the_best_peer_is_compared_round_by_round() -> None:
    found = {"shoal": measured(ours(), 400, 100, 300), "fastapi": measured(JSON, 200, 100, 100)}
    assert against_best({**found, "mlserver": measured(OIP, 100, 50, 900)}) == ("fastapi", 2.0)


@pytest.mark.parametrize("peers", [{}, {"fastapi": measured(JSON, 0, 0)}])
def test_without_a_goodput_of_a_peer_there_is_no_ratio(peers: dict[str, Measured]) -> None:
    assert against_best({"shoal": measured(ours(), 400, 300), **peers})[1] is None


@pytest.mark.parametrize("server", [OIP, JSON, ROWS], ids=lambda server: server.protocol)
@pytest.mark.parametrize("model", KINDS)
def test_each_protocol_carries_the_same_sample(server: Server, model: str) -> None:
    sample = KINDS[model].sample()
    asked = json.loads(body(server, model))
    if server is OIP:
        asked = {each["name"]: each["data"] for each in asked["inputs"]}
        sample = {name: value if isinstance(value, list) else [value] for name, value in sample.items()}
    elif server is ROWS:
        assert len(asked["rows"][0]) == KINDS[model].width()
        return
    assert asked == sample


def test_a_deadline_goes_with_the_protocol_that_knows_one() -> None:
    assert json.loads(body(OIP, "clothes", deadline_s=0.25))["parameters"] == {"timeout": 250_000}


def test_an_answer_says_the_same_in_each_protocol() -> None:
    outputs = [{"name": "probabilities", "data": [0.25, 0.75]}, {"name": "label", "data": [1]}]
    assert numbers(OIP, {"outputs": outputs}) == [1, 0.25, 0.75]
    assert numbers(JSON, {"probabilities": [0.25, 0.75], "label": 1}) == [1, 0.25, 0.75]
    assert numbers(ROWS, [[1, 0.25, 0.75]]) == [1, 0.25, 0.75]


def test_overload_is_told_at_twice_the_capacity() -> None:
    calm, twice = rung(100, 20), Load.of([*answers(*[200] * 90, took_ms=200), *answers(*[429] * 110, took_ms=3)], 1.0)
    us = Course({1.0: calm, 2.0: twice}, 10_000_000, 12_500_000, 12_600_000)
    late = Course({1.0: calm, 2.0: rung(100, 900)}, 0, 0, 0)
    some = Course({1.0: calm, 2.0: rung(40, 249)}, 0, 0, 0)
    found = figures_of({"shoal": us, "fastapi": late, "flask": some}, 100.0)
    assert (found["goodput_fraction"], found["refused_p99_ms"], found["memory_growth_mb"]) == (0.9, 3.0, 2.5)
    assert found["memory_growth_again_mb"] == 0.1
    assert (found["best_peer"], found["peer_goodput_fraction"]) == ("flask", 0.4)
    assert figures_of({"shoal": us, "fastapi": late}, 100.0)["best_peer"] is None
