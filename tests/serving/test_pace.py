"""How long a batch will take is told from those before."""

from __future__ import annotations

import pytest

from shoal.serving.pace import Pace, round_size


def paced(*batches: tuple[int, float]) -> Pace:
    pace = Pace()
    for num_samples, took_s in batches:
        pace.add(num_samples, took_s)
    return pace


def test_before_the_first_nothing_is_known_and_anything_goes():
    assert Pace().takes_s(64) == 0 and Pace().most_within(0.01, 64) == 64


def test_the_parts_of_a_batch_and_of_a_sample_are_told_apart():
    pace = paced(*((n, 0.002 + 0.0001 * n) for n in (1, 8, 64, 3, 17) * 4))
    assert (pace.batch_s, pace.sample_s) == (pytest.approx(0.002), pytest.approx(0.0001))
    assert pace.takes_s(100) == pytest.approx(0.012)
    assert pace.most_within(0.0051, 64) == 31


def test_what_costs_by_the_batch_alone_may_be_as_large_as_it_likes():
    pace = paced(*((n, 0.03) for n in (1, 8, 64) * 5))
    assert pace.sample_s == pytest.approx(0, abs=1e-12) and pace.most_within(0.05, 64) == 64


def test_batches_of_one_size_are_thought_to_grow_with_it():
    pace = paced((4, 0.02), (4, 0.02))
    assert pace.takes_s(8) == pytest.approx(0.04) and pace.most_within(0.052, 64) == 10


def test_a_batch_is_one_sample_at_least():
    assert paced((1, 3.0)).most_within(0.05, 64) == 1


def test_a_batch_is_worth_its_size_while_its_own_part_counts():
    pace = paced(*((n, 0.002 + 0.0007 * n) for n in (1, 8, 64, 3, 17) * 4))
    assert pace.worth(64) == 19 and pace.worth(12) == 12  # 0.002 is an eighth of what 20 take
    assert paced(*((n, 0.0007 * n) for n in (1, 8, 64) * 4)).worth(64) == 8
    assert paced(*((n, 0.03) for n in (1, 8, 64) * 4)).worth(64) == 64
    assert Pace().worth(64) == 64


def test_what_is_known_of_the_own_part_is_tried_again_in_time():
    pace = paced(*((n, 0.002 + 0.0007 * n) for n in (1, 8, 64, 3, 17) * 4))
    sizes = []
    for own_s in (0.002, 0.02):
        for _ in range(150):
            sizes.append(pace.worth(64))
            pace.add(sizes[-1], own_s + 0.0007 * sizes[-1])
    assert sizes[0] == 19 and set(sizes[:150]) == {19, 20, 40} and sizes.count(40) < 15
    assert sizes[-1] == 64


def test_what_was_is_forgotten():
    pace = paced(*[(1, 1.0)] * 50, *[(1, 0.01)] * 150)
    assert pace.takes_s(1) == pytest.approx(0.01, rel=0.1)


def test_large_sizes_are_few():
    sizes = sorted({round_size(num) for num in range(1, 81)})
    assert sizes == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80]
    assert all(0.8 * num < round_size(num) <= num for num in range(1, 81))
