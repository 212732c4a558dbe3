from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import StoreFault
from shoal.lanes import Ledger, Order, Part, Steps, deal
from shoal.sources import Arrays, Batch, LocalBatch, Prefetch, Reader

TIMEOUT_S = 30

plans = st.builds(Steps, st.integers(1, 80), st.integers(1, 30), st.integers(1, 12), epochs=st.integers(1, 3))


class Watched:
    """A reader that keeps account of what it is told, and can be made to wait or to fail."""

    def __init__(self, inner: Reader) -> None:
        self.inner = inner
        self.held: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.error: BaseException | None = None

    def gather(self, parts: Sequence[Part]) -> Batch:
        self.entered.release()
        assert self.gate.wait(TIMEOUT_S)
        if self.error:
            raise self.error
        assert {part.block for part in parts} <= self.held, "a block was needed that had not been announced"
        return self.inner.gather(parts)

    def expect(self, blocks: Collection[int]) -> None:
        self.held.update(blocks)

    def release(self, blocks: Collection[int]) -> None:
        assert self.held >= set(blocks)
        self.held.difference_update(blocks)

    def close(self) -> None:
        self.inner.close()


def source_of(num_samples: int) -> Arrays:
    return Arrays(np.arange(num_samples), block_rows=7)


def orders_of(source: Arrays, num_lanes: int) -> Any:
    return lru_cache(2)(lambda epoch: Order(source.block_sizes(), num_lanes, seed=5, epoch=epoch))


def loader_of(
    steps: Steps, lanes: tuple[int, ...], *, first_step: int = 0, micro_batch: int | None = None
) -> tuple[Prefetch, Watched]:
    source = source_of(steps.num_samples)
    reader = Watched(source.open())
    order = orders_of(source, steps.num_lanes)
    return Prefetch(reader, order, steps, lanes, first_step=first_step, micro_batch=micro_batch), reader


def twin(steps: Steps, lanes: tuple[int, ...], first_step: int, micro_batch: int | None) -> Iterator[LocalBatch]:
    """The same, in the plainest way: one sample at a time, nothing ahead."""
    source = source_of(steps.num_samples)
    reader, order = source.open(), orders_of(source, steps.num_lanes)
    for step in range(first_step, steps.total_steps):
        span = steps.span(step)
        samples, ledger = [], Ledger()
        for lane in lanes:
            for position in range(span.starts[lane], span.stops[lane]):
                (part,) = order(span.epoch).slice(lane, position, position + 1)
                samples.append(reader.gather([part])[0])
                ledger += Ledger.of(span.epoch, lane, position, position + 1)
        size = micro_batch or max(1, len(samples))
        batches: list[Batch] = [(torch.cat(samples[i : i + size]),) for i in range(0, len(samples), size)]
        yield LocalBatch(step, span.epoch, len(samples), batches, ledger)


def comparable(local: LocalBatch) -> Any:
    values = [batch[0].tolist() for batch in local.batches]  # type: ignore[index]
    return local.step, local.epoch, local.num_samples, values, local.ledger


@settings(max_examples=60)
@given(plans, st.integers(1, 40), st.data())
def test_it_yields_what_its_slow_twin_yields(steps: Steps, micro_batch: int, data: st.DataObject) -> None:
    lanes = tuple(sorted(data.draw(st.sets(st.integers(0, steps.num_lanes - 1)))))
    first = data.draw(st.integers(0, steps.total_steps))
    loader, reader = loader_of(steps, lanes, first_step=first, micro_batch=micro_batch)
    found = [comparable(local) for local in loader]
    loader.close()
    assert found == [comparable(local) for local in twin(steps, lanes, first, micro_batch)]
    assert not reader.held, "a block was kept that nobody needs"


@settings(max_examples=30)
@given(plans, st.integers(1, 5))
def test_workers_together_take_every_sample_once_an_epoch(steps: Steps, num_workers: int) -> None:
    taken: list[list[int]] = [[] for _ in range(steps.epochs or 0)]
    for lanes in deal(steps.num_lanes, {str(worker): 1.0 for worker in range(num_workers)}).values():
        loader, _ = loader_of(steps, lanes)
        for local in loader:
            taken[local.epoch].extend(value for batch in local.batches for value in batch[0].tolist())  # type: ignore[index]
        loader.close()
    assert all(sorted(values) == list(range(steps.num_samples)) for values in taken)


def test_a_worker_without_lanes_goes_through_the_steps_with_nothing() -> None:
    loader, _ = loader_of(Steps(10, 4, 2, epochs=1), lanes=())
    assert list(loader) == [LocalBatch(step, 0, 0) for step in range(3)]
    loader.close()


def test_micro_batches_hold_at_most_what_they_may() -> None:
    loader, _ = loader_of(Steps(20, 10, 4, epochs=1), lanes=(0, 1, 2, 3), micro_batch=4)
    assert [[len(batch[0]) for batch in local.batches] for local in loader] == [[4, 4, 2], [4, 4, 2]]  # type: ignore[index]
    loader.close()


def test_what_goes_wrong_in_the_background_is_raised_where_it_is_awaited() -> None:
    steps = Steps(40, 4, 2, epochs=1)
    loader, reader = loader_of(steps, lanes=(0, 1))
    next(loader)
    reader.error = StoreFault("the disk is gone")
    for _ in range(2):  # and again, to whoever asks again
        with pytest.raises(StoreFault, match="the disk is gone"):
            list(loader)
    loader.close()


def test_even_a_decode_that_exits_is_not_waited_for_for_ever() -> None:
    loader, reader = loader_of(Steps(40, 40, 2, epochs=2), lanes=(0, 1))
    reader.error = SystemExit(3)
    with pytest.raises(SystemExit):
        list(loader)
    loader.close()


def test_the_end_stays_the_end() -> None:
    loader, _ = loader_of(Steps(4, 4, 2, epochs=1), lanes=(0, 1))
    assert len(list(loader)) == 1
    assert not list(loader)
    loader.close()
    loader.close()
    assert not list(loader)


def test_closing_while_it_waits_for_room_ends_its_thread() -> None:
    loader, reader = loader_of(Steps(4000, 4, 2, epochs=1), lanes=(0, 1))
    for _ in range(3):  # two are ready, and the third waits for room
        assert reader.entered.acquire(timeout=TIMEOUT_S)
    before = loader._thread
    assert before.is_alive()
    loader.close()
    assert not before.is_alive()
    assert not list(loader)
    assert not reader.held


def test_closing_while_it_reads_waits_for_that_read_only() -> None:
    loader, reader = loader_of(Steps(4000, 4, 2, epochs=1), lanes=(0, 1))
    reader.gate.clear()
    while reader.entered.acquire(blocking=False):
        pass
    next(loader)
    closing = threading.Thread(target=loader.close)
    closing.start()
    reader.gate.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert not loader._thread.is_alive()


def test_two_steps_at_most_wait_ready() -> None:
    loader, reader = loader_of(Steps(4000, 4, 2, epochs=1), lanes=(0, 1))
    for _ in range(3):
        assert reader.entered.acquire(timeout=TIMEOUT_S)
    assert not reader.entered.acquire(timeout=0.05)
    loader.close()


def test_steps_come_in_order_over_epochs() -> None:
    loader, _ = loader_of(Steps(10, 4, 3, epochs=3), lanes=(1,))
    found = [(local.step, local.epoch) for local in loader]
    assert found == [(step, step // 3) for step in range(9)]
    assert all(b[0] - a[0] == 1 for a, b in pairwise(found))
    loader.close()
