"""Tables against their slow twin, bit by bit, and what they promise besides."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.errors import ConfigError, Diverged
from shoal.tables import FTRL, SGD, Adagrad, Adam, Image, TableSpec
from shoal.tables.table import Table
from shoal.testing.tables import PlainTable

RULES = [SGD(lr=0.1), Adagrad(lr=0.1, initial=0.1), Adam(lr=0.01), FTRL(alpha=0.1, beta=1.0, l1=0.3, l2=0.1)]
SMALL = 1 << 24
EXTREMES = np.array([0, -1, 1, np.iinfo(np.int64).max, np.iinfo(np.int64).min], np.int64)


def spec(**given):
    return TableSpec(**{"name": "words", "dim": 5, "seed": 3} | given)


def batches(num=12, size=40, num_ids=200, seed=0, dim=5):
    random = np.random.default_rng(seed)
    known = np.concatenate([EXTREMES, random.integers(-(2**63), 2**63 - 1, num_ids)])
    for _ in range(num):
        yield random.choice(known, size), random.standard_normal((size, dim)).astype(np.float32)


def same(table, plain):
    ids = np.array([*plain.rows, 12345, -999], np.int64)
    np.testing.assert_array_equal(table.pull(ids), plain.pull(ids))
    image = table.image()
    held = {i: (row.slots is not None or -row.count, row.touched) for i, row in plain.rows.items()}
    assert (
        dict(zip(image.ids.tolist(), zip(image.counts.tolist(), image.touched.tolist(), strict=True), strict=True))
        == held
    )


def equal(one, other):
    one, other = one.by_id(), other.by_id()
    assert one.meta() == other.meta()
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, other.arrays()[name], name)


def trained(given, num=12, seed=0):
    table = Table(given, SMALL)
    for step, (ids, gradients) in enumerate(batches(num, seed=seed)):
        table.push(ids, gradients, now_s=step)
    return table


@pytest.mark.parametrize(
    ("rule", "given"),
    [(r, {}) for r in RULES]
    + [(r, {"admit_after": 3}) for r in RULES]
    + [(r, {"dtype": "bfloat16"}) for r in RULES[:3]],
    ids=str,
)
def test_a_table_is_its_twin_bit_by_bit(rule, given):
    table, plain = Table(spec(rule=rule, **given), SMALL), PlainTable(spec(rule=rule, **given))
    for ids, gradients in batches():
        table.push(ids, gradients)
        plain.push(ids, gradients)
    same(table, plain)


def test_it_grows_without_losing_an_id():
    table, plain = Table(spec(), SMALL), PlainTable(spec())
    for ids, gradients in batches(num=40, size=300, num_ids=9000):
        table.push(ids, gradients)
        plain.push(ids, gradients)
    assert table.stats.num_rows == len(plain.rows) > 5000
    same(table, plain)


def test_a_push_that_fits_is_taken_where_there_is_no_memory_for_the_next_index(monkeypatch):
    table = Table(TableSpec(name="t", dim=2, rule=SGD(lr=1.0), initial_scale=0.0))

    def refuse(*_, **__):
        raise ConfigError("no more memory")

    monkeypatch.setattr("shoal.tables.table.zeros", refuse)
    for start in range(0, 860, 10):  # of 1024 places; the next index is prepared from 820 on
        table.push(np.arange(start, start + 10), np.ones((10, 2), np.float32))
    with pytest.raises(ConfigError, match="no more memory"):
        table.push(np.arange(860, 880), np.ones((20, 2), np.float32))
    assert table.stats.num_rows == 860 and (table.pull(np.arange(870)) == -1).all(1).sum() == 860


def test_what_was_never_pushed_has_a_known_value_within_the_scale():
    ids = np.arange(-500, 500)
    first = Table(spec(initial_scale=0.5), SMALL).pull(ids)
    np.testing.assert_array_equal(first, Table(spec(initial_scale=0.5), SMALL).pull(ids))
    assert (
        np.abs(first).max() <= 0.5 and abs(first.mean()) < 0.02 and first.std() == pytest.approx(0.5 / 3**0.5, rel=0.05)
    )
    assert not np.array_equal(first, Table(spec(initial_scale=0.5, seed=4), SMALL).pull(ids))
    assert not np.array_equal(first, Table(spec(initial_scale=0.5, name="other"), SMALL).pull(ids))


def test_ids_expire_by_event_time_and_their_rows_are_used_again():
    table, plain = Table(spec(expire_after_s=4), SMALL), PlainTable(spec(expire_after_s=4))
    for step, (ids, gradients) in enumerate(batches(num=30, size=20, num_ids=300)):
        for each in (table, plain):
            each.push(ids, gradients, now_s=step)
        if step % 7 == 6:
            np.testing.assert_array_equal(np.sort(table.expire(step)), plain.expire(step))
    same(table, plain)
    assert table.stats.num_rows < 200 and table.stats.num_bytes < 110_000


def test_a_delta_on_top_of_a_full_image_is_the_table():
    table = Table(spec(expire_after_s=5, admit_after=2), SMALL)
    copy = Table(table.spec, SMALL)
    merged = None
    for step, (ids, gradients) in enumerate(batches(num=20, size=30)):
        table.push(ids, gradients, now_s=step)
        if step % 5 == 3:
            table.expire(step)
        delta = table.image(copy.clock if step else -1)
        delta = Image.of(delta.meta(), delta.arrays())
        merged = merged.then(delta) if merged else delta
        copy.apply(delta)
        equal(copy.image(), table.image())
    equal(merged, table.image())


def test_deltas_may_be_put_together_before_they_are_applied():
    table, copy = trained(spec(expire_after_s=3), 4), Table(spec(expire_after_s=3), SMALL)
    copy.apply(table.image())
    deltas = []
    for step, (ids, gradients) in enumerate(batches(6, size=10, seed=1)):
        before = table.clock
        table.push(ids, gradients, now_s=4 + step)
        table.expire(4 + step)
        deltas.append(table.image(before))
    together = deltas[0]
    for delta in deltas[1:]:
        together = together.then(delta)
    copy.apply(together)
    equal(copy.image(), table.image())


def test_a_table_that_was_restored_goes_on_as_if_nothing_had_happened():
    table = trained(spec(rule=Adam(lr=0.1), dtype="bfloat16"))
    other = Table(table.spec, SMALL)
    other.apply(table.image())
    for ids, gradients in batches(5, seed=9):
        table.push(ids, gradients)
        other.push(ids, gradients)
    equal(other.image(), table.image())


@pytest.mark.parametrize("most_noted", [3, 1 << 20], ids=["too many to note", "noted"])
def test_a_delta_since_what_was_not_forgotten_holds_all_that_was_touched_and_nothing_else(monkeypatch, most_noted):
    monkeypatch.setattr("shoal.tables.table._MOST_NOTED", most_noted)
    table, copy = (Table(spec(expire_after_s=2), SMALL) for _ in range(2))
    table.push(np.arange(5000), np.ones((5000, 5), np.float32), now_s=10)
    before = table.clock
    copy.apply(table.image())
    table.forget(before)
    for now_s, ids in ((11, [7, 9]), (13, [5001, 9]), (13, [1 << 40])):
        table.push(np.array(ids), np.ones((len(ids), 5), np.float32), now_s=now_s)
    assert set(table.expire(14)) == {*range(5000)} - {9}
    table.push(np.array([8, 8]), np.ones((2, 5), np.float32), now_s=15)
    table.push(np.arange(10_000, 14_000), np.ones((4000, 5), np.float32), now_s=15)
    delta = table.image(before)
    assert set(delta.ids) == {8, 9, 5001, 1 << 40, *range(10_000, 14_000)}
    copy.apply(delta)
    equal(copy.image(), table.image())
    equal(copy.image(before), delta)


def test_a_delta_after_a_gap_is_refused():
    table = trained(spec())
    late = table.image(table.clock - 1)
    with pytest.raises(ConfigError, match="a full image is needed"):
        Table(spec(), SMALL).apply(late)
    table.forget(table.clock)
    with pytest.raises(ConfigError, match="take a full image"):
        table.image(3)


def test_rounding_to_bfloat16_loses_nothing_in_the_mean():
    ids, gradients = np.arange(4000), np.full((4000, 1), -1e-4, np.float32)
    table = Table(spec(dim=1, rule=SGD(lr=1.0), dtype="bfloat16", initial_scale=0.0), SMALL)
    for _ in range(100):
        table.push(ids, gradients)
    assert table.pull(ids).mean() == pytest.approx(1e-2, rel=0.02)


def test_ids_beyond_the_memory_budget_get_no_row_and_are_counted():
    table = Table(spec(), memory_bytes=10 * 4 * spec().num_words)
    ids = np.arange(25)
    for _ in range(2):
        table.push(ids, np.ones((25, 5), np.float32))
    assert (table.stats.num_rows, table.stats.num_waiting, table.stats.num_refused) == (10, 15, 30)
    np.testing.assert_array_equal(table.pull(ids[10:]), Table(spec(), SMALL).pull(ids[10:]))
    with pytest.raises(ConfigError, match="and the budget is 16"):
        Table(spec(), memory_bytes=16)
    before = table.image()
    with pytest.raises(ConfigError, match="which is 10 rows; give it more memory"):
        table.apply(trained(spec()).image())
    equal(table.image(), before)


@pytest.mark.parametrize(
    "ids", [np.array([1.0]), np.array([1], np.uint64), np.array([[1]]), np.array(["a"]), np.array([True])]
)
def test_ids_of_another_kind_are_refused(ids):
    with pytest.raises(ConfigError, match="ids must be a vector of int64"):
        Table(spec(), SMALL).pull(ids)


@pytest.mark.parametrize(
    "gradients", [np.ones((2, 4), np.float32), np.ones((1, 5), np.float32), np.ones((2, 5), np.int64)]
)
def test_gradients_of_another_shape_are_refused(gradients):
    with pytest.raises(ConfigError, match=r"must be float32 of shape \(2, 5\)"):
        Table(spec(), SMALL).push([1, 2], gradients)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(bad):
    table = trained(spec())
    before = table.image()
    gradients = np.ones((3, 5), np.float32)
    gradients[1, 4] = bad
    with pytest.raises(Diverged, match="the gradient of id 77 is not finite"):
        table.push([1, 77, 3], gradients)
    equal(table.image(), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dim": 0}, "dim must be from 1"),
        ({"name": "a b"}, "name is letters"),
        ({"admit_after": 0}, "admit_after"),
        ({"expire_after_s": 0}, "expire_after_s"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"dtype": "bfloat16", "rule": FTRL(alpha=0.1)}, "stores no weights"),
        ({"initial_scale": float("nan")}, "initial_scale"),
    ],
)
def test_a_table_that_cannot_be_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        spec(**given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(lr=0),
        lambda: Adagrad(lr=0.1, eps=-1),
        lambda: Adam(lr=0.1, beta2=1.0),
        lambda: FTRL(alpha=float("nan")),
    ],
)
def test_a_rule_that_cannot_be_is_refused(make):
    with pytest.raises(ConfigError, match="must be"):
        make()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_spec_is_read_as_it_was_written(rule):
    assert TableSpec.read(spec(rule=rule).record()) == spec(rule=rule)


def test_an_image_of_another_dimension_is_refused():
    image = trained(spec()).image()
    with pytest.raises(ConfigError, match="is not one of"):
        Table(spec(dim=6), SMALL).apply(image)
    with pytest.raises(ConfigError, match="rows was to be"):
        Image.of(image.meta(), image.arrays() | {"rows": image.rows[:, 1:]})
