from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import StoreFault
from shoal.lanes import Ledger, Order, Part, Steps, deal
from shoal.sources import Arrays, Batch, LocalBatch, Parquet, Prefetch, Reader, Source
from shoal.sources.prefetch import split
from tests.sources.rows import LABELS, NUM_ROWS, POINTS, columns, same, twin, write

NUM_LANES = 5


def order_of(source: Source, num_lanes: int = NUM_LANES) -> Callable[[int], Order]:
    return lambda epoch: Order(source.block_sizes(), num_lanes, 7, epoch)


def run(
    source: Source, steps: Steps, lanes: Sequence[int], first: int = 0, micro: int | None = None
) -> list[LocalBatch]:
    reader = source.open()
    orders = order_of(source, steps.num_lanes)
    loader = Prefetch(reader, orders, steps, tuple(lanes), first_step=first, micro_batch=micro)
    found = list(loader)
    loader.close()
    reader.close()
    return found


def labels_of(local: LocalBatch) -> list[int]:
    return [label for batch in local.batches for label in columns(batch)[1].tolist()]


@settings(max_examples=60)
@given(
    batch=st.integers(1, 60),
    num_lanes=st.integers(1, 70),
    workers=st.integers(1, 4),
    micro=st.none() | st.integers(1, 20),
    first=st.integers(0, 3),
)
def test_every_step_is_what_a_plain_loop_over_lanes_reads(
    batch: int, num_lanes: int, workers: int, micro: int | None, first: int
) -> None:
    source = Arrays(POINTS, LABELS, block_rows=6)
    steps = Steps(NUM_ROWS, batch, num_lanes, epochs=2)
    lanes = deal(num_lanes, {str(worker): 1.0 for worker in range(workers)})["0"]
    for step, local in enumerate(run(source, steps, lanes, first, micro), start=first):
        span = steps.span(step)
        order = order_of(source, num_lanes)(span.epoch)
        parts = [part for lane in lanes for part in order.slice(lane, int(span.starts[lane]), int(span.stops[lane]))]
        points, labels = twin(source, parts) if parts else (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
        most = micro or NUM_ROWS
        assert (local.step, local.epoch, local.num_samples) == (step, span.epoch, len(labels))
        assert len(local.batches) == -(-len(labels) // most)
        for index, batch_ in enumerate(local.batches):
            some = slice(index * most, (index + 1) * most)
            assert same(batch_, (points[some], labels[some]))


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 7])
def test_workers_together_take_every_sample_of_an_epoch_once(tmp_path: Path, workers: int) -> None:
    source = Parquet(write(tmp_path), ["point", "label"], cached_bytes=0)
    steps = Steps(NUM_ROWS, 8, NUM_LANES, epochs=3)
    lanes = deal(NUM_LANES, {f"worker {rank}": 1.0 for rank in range(workers)})
    found = [run(source, steps, mine) for mine in lanes.values()]
    for of_step in zip(*found, strict=True):
        span = steps.span(of_step[0].step)
        assert sum((local.ledger for local in of_step), Ledger()) == Ledger.expected(span)
    for epoch in range(3):
        assert sorted(x for mine in found for local in mine if local.epoch == epoch for x in labels_of(local)) == [
            *LABELS
        ]


def test_a_worker_without_lanes_is_told_of_every_step() -> None:
    found = run(Arrays(POINTS, LABELS), Steps(NUM_ROWS, 8, NUM_LANES, total_steps=3), ())
    assert [(local.step, local.num_samples, local.batches, local.ledger) for local in found] == [
        (step, 0, [], Ledger()) for step in range(3)
    ]


def test_past_the_last_step_there_is_nothing() -> None:
    assert run(Arrays(POINTS, LABELS), Steps(NUM_ROWS, 8, NUM_LANES, total_steps=3), range(NUM_LANES), first=3) == []


@given(sizes=st.lists(st.integers(0, 9)), most=st.integers(1, 12))
def test_micro_batches_are_full_but_for_the_last(sizes: list[int], most: int) -> None:
    parts = [Part(block, np.arange(size)) for block, size in enumerate(sizes)]
    groups = [[(part.block, int(row)) for part in group for row in part.rows] for group in split(parts, most)]
    assert [row for group in groups for row in group] == [
        (block, row) for block, size in enumerate(sizes) for row in range(size)
    ]
    assert all(len(group) == most for group in groups[:-1])
    assert len(groups[-1]) <= most


class Gate:
    """A reader that waits for leave before each batch, fails at one of them, and notes what it is asked for."""

    def __init__(self, inner: Reader, *, is_open: bool = True, fails_at: int | None = None) -> None:
        self._inner = inner
        self._leave = threading.Event()
        self._fails_at = fails_at
        self.entered = threading.Event()
        self.num_gathered = 0
        self.held: set[int] = set()
        self.most_held = 0
        self.unannounced: set[int] = set()
        if is_open:
            self._leave.set()

    def let_go(self) -> None:
        self._leave.set()

    def gather(self, parts: Sequence[Part]) -> Batch:
        self.entered.set()
        self._leave.wait()
        if self.num_gathered == self._fails_at:
            raise StoreFault("the disk is gone")
        self.num_gathered += 1
        self.unannounced.update({part.block for part in parts} - self.held)
        return self._inner.gather(parts)

    def expect(self, blocks: Collection[int]) -> None:
        assert not self.held & set(blocks)
        self.held.update(blocks)
        self.most_held = max(self.most_held, len(self.held))

    def release(self, blocks: Collection[int]) -> None:
        assert self.held >= set(blocks)
        self.held.difference_update(blocks)

    def close(self) -> None:
        self._inner.close()


def gated(
    *, is_open: bool = True, fails_at: int | None = None, batch: int = 4, epochs: int = 1, block_rows: int = 256
) -> tuple[Gate, Prefetch]:
    source = Arrays(POINTS, LABELS, block_rows=block_rows)
    gate = Gate(source.open(), is_open=is_open, fails_at=fails_at)
    steps = Steps(NUM_ROWS, batch, NUM_LANES, epochs=epochs)
    return gate, Prefetch(gate, order_of(source), steps, tuple(range(NUM_LANES)), first_step=0)


def test_a_failure_is_raised_after_the_batches_before_it_and_again() -> None:
    _, loader = gated(fails_at=1)
    assert next(loader).step == 0
    for _ in range(2):
        with pytest.raises(StoreFault, match="the disk is gone"):
            next(loader)
    loader.close()


def test_after_the_last_step_it_stays_ended() -> None:
    _, loader = gated(batch=NUM_ROWS)
    assert next(loader).num_samples == NUM_ROWS
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(loader)
    loader.close()


def test_two_steps_wait_and_no_more_are_read() -> None:
    gate, loader = gated()
    first = next(loader)
    second = next(loader)
    loader.close()
    assert (first.step, second.step) == (0, 1)
    assert 2 <= gate.num_gathered <= 5


def test_small_steps_are_gathered_together_and_large_ones_alone() -> None:
    gate, loader = gated(batch=4)
    assert len(list(loader)) == 12
    assert gate.num_gathered == 3  # one step to see how large they are, then 8 and 3
    loader.close()
    large = Arrays(np.zeros((8, 5 << 20), np.uint8), block_rows=2)
    gate = Gate(large.open())
    loader = Prefetch(gate, order_of(large), Steps(8, 1, NUM_LANES, epochs=1), tuple(range(NUM_LANES)), first_step=0)
    assert len(list(loader)) == gate.num_gathered == 8
    loader.close()


def test_closing_ends_a_thread_that_waits_for_room() -> None:
    _, loader = gated()
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_closing_waits_for_the_read_it_is_in() -> None:
    gate, loader = gated(is_open=False)
    gate.entered.wait()
    closing = threading.Thread(target=loader.close)
    closing.start()
    gate.let_go()
    closing.join(30)
    assert not closing.is_alive()
    assert gate.num_gathered <= 1
    assert not gate.held


def test_closing_frees_who_waits_for_a_batch() -> None:
    gate, loader = gated(is_open=False)
    waiting = threading.Thread(target=next, args=(loader, None))
    waiting.start()
    gate.entered.wait()
    closing = threading.Thread(target=loader.close)
    closing.start()
    gate.let_go()
    waiting.join(30)
    closing.join(30)
    assert not waiting.is_alive()
    assert not closing.is_alive()


@pytest.mark.parametrize("batch", [1, 4, 20, NUM_ROWS])
@pytest.mark.parametrize("block_rows", [1, 3, 10, 100])
def test_whatever_is_gathered_was_announced_and_is_let_go(batch: int, block_rows: int) -> None:
    gate, loader = gated(batch=batch, epochs=3, block_rows=block_rows)
    for _ in loader:
        pass
    loader.close()
    assert not gate.unannounced
    assert not gate.held


def test_no_more_is_held_than_the_lanes_are_in_and_what_comes_next() -> None:
    values = np.arange(64_000)
    source = Arrays(values, block_rows=640)
    gate = Gate(source.open())
    steps = Steps(64_000, 16, 8, epochs=2)
    loader = Prefetch(gate, order_of(source, 8), steps, tuple(range(4)), first_step=0)
    assert sum(local.num_samples for local in loader) == 64_000
    loader.close()
    assert gate.most_held <= 4 + 4


def test_each_row_group_is_read_once_an_epoch_though_nothing_is_kept(tmp_path: Path) -> None:
    reads: list[int] = []

    def count(rows: object) -> Batch:
        reads.append(rows["label"][0].as_py())  # type: ignore[index]
        return (torch.tensor(rows["label"].to_pylist()),) * 2  # type: ignore[index]

    source = Parquet(write(tmp_path, rows_a_group=4), ["label"], count, cached_bytes=0)
    found = run(source, Steps(NUM_ROWS, 4, 4, epochs=1), range(4))
    assert sum(local.num_samples for local in found) == NUM_ROWS
    assert len(source.block_sizes()) <= len(reads) <= len(source.block_sizes()) + 3
