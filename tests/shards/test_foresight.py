"""Rows that are pulled before they are asked for: those that will be, and never others' in their place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import shoal
from shoal.shards.client import Pulling
from shoal.shards.foresight import Foresight
from shoal.tables.table import Table


class Pulls:
    """Pulls of tables in this process, which tell what was asked and dropped."""

    def __init__(self, *modules):
        self.tables = {module.spec.name: Table(module.spec) for module in modules}
        self.asked, self.dropped, self.direct = [], [], []
        self.foresight = Foresight(self.ask, self.rows, self.dropped.append)
        for module in modules:
            module.source, module.foresight = self, self.foresight

    def ask(self, table, ids, step):
        self.asked.append((table, ids.tolist(), step))
        return Pulling(table, ids, step, {}, None, True, ("s0",))

    def rows(self, pulling):
        return self.tables[pulling.table].pull(pulling.ids)

    def pull(self, table, ids):
        self.direct.append((table, ids.tolist()))
        return self.tables[table].pull(ids)


USERS, TAGS = shoal.Embedding("users", 3), shoal.EmbeddingBag("tags", 2)


def batches_of(seed, rows=6, number=1):
    random = np.random.default_rng(seed)
    return [
        {"y": torch.rand(rows), "ids": torch.from_numpy(random.integers(0, 50, (rows, 4)))} for _ in range(number)
    ]  # fmt: skip


def computed(batches):
    """One column for one module, three for the other."""
    return [(USERS(batch["ids"][:, 2]), TAGS(batch["ids"][:, 1:])) for batch in batches]


def alone(batches):
    other = Pulls(USERS, TAGS)
    found = computed(batches)
    assert len(other.direct) == 2 * len(batches)
    return found


def equal(one, other):
    for left, right in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("number", [1, 3])
def test_columns_that_were_asked_for_are_pulled_ahead_the_next_time(number):
    first, second, third = batches_of(0, 6, number), batches_of(1, 6, number), batches_of(2, 4, number)
    wanted = [alone(batches) for batches in (first, second, third)]
    pulls = Pulls(USERS, TAGS)
    pulls.foresight.look(first, 0)
    assert not pulls.asked
    pulls.foresight.begin(first, 0)
    equal(computed(first), wanted[0])
    assert len(pulls.direct) == 2 * number
    for step, batches in ((1, second), (2, third)):
        pulls.foresight.look(batches, step)
        assert {asked_for for _, _, asked_for in pulls.asked[-2 * number :]} == {step}
        pulls.foresight.begin(batches, step)
        equal(computed(batches), wanted[step])
    assert len(pulls.direct) == 2 * number and pulls.foresight.num_found == 4 * number and not pulls.dropped


def test_a_guess_that_is_wrong_costs_a_pull_and_no_more():
    batches, others = batches_of(0), batches_of(1)
    wanted = alone(others)
    pulls = Pulls(USERS, TAGS)
    pulls.foresight.begin(batches, 0)
    computed(batches)
    pulls.foresight.look(batches, 1)
    pulls.foresight.begin(others, 1)  # other samples than were expected
    equal(computed(others), wanted)
    assert pulls.foresight.num_found == 0 and len(pulls.dropped) == 2
    pulls.foresight.look(batches, 2)
    pulls.foresight.begin(others, 5)  # another step: its rows may be others
    equal(computed(others), wanted)
    assert pulls.foresight.num_found == 0 and len(pulls.dropped) == 4


def test_a_step_is_looked_at_while_the_one_before_it_is_computed():
    first, second = batches_of(0), batches_of(1)
    pulls = Pulls(USERS, TAGS)
    pulls.foresight.begin(first, 0)
    computed(first)
    pulls.foresight.look(first, 1)
    pulls.foresight.begin(first, 1)
    pulls.foresight.look(second, 2)
    computed(first)
    pulls.foresight.begin(second, 2)
    computed(second)
    assert pulls.foresight.num_found == 4 and not pulls.dropped


def test_ids_that_are_computed_from_the_batch_are_asked_for_when_they_are_there():
    pulls = Pulls(USERS, TAGS)
    for step in range(2):
        (batch,) = batches_of(step)
        pulls.foresight.look([batch], step)
        pulls.foresight.begin([batch], step)
        USERS(batch["ids"][:, 0] * 2)
        USERS(batch["ids"][:, 0].int())
    assert not pulls.asked and len(pulls.direct) == 4


def test_evaluation_looks_at_nothing():
    pulls = Pulls(USERS, TAGS)
    (batch,) = batches_of(0)
    pulls.foresight.begin([batch], 0)
    computed([batch])
    pulls.foresight.look([batch], 1)
    USERS.eval()
    try:
        USERS(batch["ids"][:, 2])
    finally:
        USERS.train()
    assert len(pulls.direct) == 3 and pulls.foresight.num_found == 0
    pulls.foresight.clear()
    assert len(pulls.dropped) == 2


def test_a_batch_that_the_task_changes_in_place_is_asked_for_as_it_then_is():
    pulls = Pulls(USERS, TAGS)
    for step in range(3):
        (batch,) = batches_of(step)
        pulls.foresight.look([batch], step)
        pulls.foresight.begin([batch], step)
        batch["ids"].add_(100)
        computed([batch])
    assert pulls.foresight.num_found == 0 and len(pulls.direct) == 6
    assert all(min(ids) >= 100 for _, ids in pulls.direct)


def test_batches_of_another_shape_are_not_guessed_at():
    pulls = Pulls(USERS, TAGS)
    for step, width in enumerate([50, 40, 40]):
        batch = {"ids": torch.arange(6 * width).view(6, width)}
        pulls.foresight.look([batch], step)
        pulls.foresight.begin([batch], step)
        TAGS(batch["ids"])
    pulls.foresight.look([{}], 3)
    assert len(pulls.direct) == 2 and pulls.foresight.num_found == 1
