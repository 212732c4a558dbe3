"""Requests go through the model together while it is busy, none waits for company, and too many are refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.errors import Bug, ConfigError, Fault
from shoal.serving.batching import Batcher, Batching, Done, Expired, Lost, Overloaded, Threaded
from shoal.serving.datatypes import Array, Arrays


class Model:
    """Doubles rows. It waits at ``gate``, and fails on a batch with a negative number."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.sizes: list[int] = []

    def predict(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        rows = inputs["row"]
        self.sizes.append(len(rows))
        assert self.gate.wait(20)
        if bool((rows < 0).any()):
            raise ValueError("a negative number")
        return {"twice": rows * 2}


class Hands:
    """A clock whose hands the test turns."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    wall_s = monotonic_s

    def sleep(self, duration_s: float) -> None:
        raise AssertionError("nobody sleeps here")


def rows(*values: float, width: int = 2) -> dict[str, Array]:
    return {"row": np.repeat(np.array(values, np.float32)[:, None], width, 1)}


def tried(test: Callable[[Model, Batcher, Hands], Awaitable[None]], **bounds: Any) -> None:
    async def run() -> None:
        model, clock = Model(), Hands()
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(Batching(**bounds), clock)
            batcher.add(Threaded(model.predict, thread))
            try:
                await test(model, batcher, clock)
            finally:
                model.gate.set()

    asyncio.run(asyncio.wait_for(run(), 30))


async def asked(batcher: Batcher, *inputs: dict[str, Array], timeout_s: float = 10.0) -> list[asyncio.Task[Any]]:
    tasks = []
    for one in inputs:
        tasks.append(asyncio.ensure_future(batcher.ask(one, timeout_s)))
        await asyncio.sleep(0)
    return tasks


async def busy(model: Model, batcher: Batcher) -> asyncio.Task[Any]:
    """With a request of one sample."""
    (first,) = await asked(batcher, rows(0.0))
    while not model.sizes:
        await asyncio.sleep(0.001)
    return first


def test_an_idle_model_takes_what_comes_at_once():
    async def test(model, batcher, clock):
        model.gate.set()
        for value in (1.0, 2.0):
            assert np.array_equal((await batcher.ask(rows(value), 1.0))["twice"], rows(2 * value)["row"])
        assert model.sizes == [1, 1]

    tried(test)


def test_what_comes_while_it_computes_goes_together_and_each_gets_its_own():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        others = await asked(batcher, rows(1.0), rows(2.0, 3.0), rows(4.0))
        model.gate.set()
        answers = await asyncio.gather(first, *others)
        assert model.sizes == [1, 4]
        assert [answer["twice"][:, 0].tolist() for answer in answers] == [[0.0], [2.0], [4.0, 6.0], [8.0]]

    tried(test)


def test_a_batch_has_at_most_so_many_samples_but_a_large_request_goes_alone():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        others = await asked(batcher, rows(1.0, 1.0), rows(2.0), rows(3.0), rows(*range(9)), rows(5.0))
        model.gate.set()
        await asyncio.gather(first, *others)
        assert model.sizes == [1, 3, 1, 9, 1]

    tried(test, max_samples=3)


def test_only_what_has_one_shape_goes_together_and_the_oldest_goes_first():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        others = await asked(batcher, rows(1.0, width=3), rows(2.0), rows(3.0, width=3), rows(4.0))
        model.gate.set()
        answers = await asyncio.gather(first, *others)
        assert model.sizes == [1, 2, 2]
        assert [tuple(answer["twice"].shape) for answer in answers[1:]] == [(1, 3), (1, 2), (1, 3), (1, 2)]

    tried(test)


def test_one_that_the_model_cannot_bear_fails_alone():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        good, bad, other = await asked(batcher, rows(1.0), rows(-1.0), rows(2.0))
        model.gate.set()
        await asyncio.gather(first, good, other)
        with pytest.raises(ValueError, match="a negative number"):
            await bad
        assert model.sizes == [1, 3, 1, 1, 1]

    tried(test)


@pytest.mark.parametrize("shape", [(2, 2), (4, 2), ()])
def test_a_model_that_has_not_a_row_for_each_sample_answers_nobody(shape):
    async def test() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher()
            batcher.add(Threaded(lambda inputs: {"twice": torch.zeros(shape)}, thread))
            for answer in await asyncio.gather(
                *(batcher.ask(rows(value, value, value), 10.0) for value in (1.0, 2.0)), return_exceptions=True
            ):
                assert isinstance(answer, Bug) and "must count 3 samples" in str(answer)

    asyncio.run(asyncio.wait_for(test(), 30))


def test_what_cannot_be_made_of_an_answer_is_a_failure_and_told():
    def make(outputs: Arrays) -> None:
        raise ValueError("on purpose")

    async def test(model, batcher, clock):
        failures: list[Exception] = []
        batcher.on_failure = failures.append
        model.gate.set()
        with pytest.raises(ValueError, match="on purpose"):
            await batcher.ask_for(rows(1.0), 10.0, make)
        assert [str(error) for error in failures] == ["on purpose"]

    tried(test)


def test_too_many_are_refused_and_told_when_to_come_again():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        waiting = await asked(batcher, rows(1.0), rows(2.0))
        with pytest.raises(Overloaded, match="2 requests wait") as refused:
            await batcher.ask(rows(3.0), 1.0)
        assert refused.value.retry_after_s > 0
        model.gate.set()
        await asyncio.gather(first, *waiting)
        assert np.array_equal((await batcher.ask(rows(3.0), 1.0))["twice"], rows(6.0)["row"])

    tried(test, max_requests=2)


def test_too_many_bytes_are_refused_but_one_request_always_fits():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        (large,) = await asked(batcher, rows(*range(100)))
        with pytest.raises(Overloaded, match="with 800 bytes"):
            await batcher.ask(rows(1.0), 1.0)
        model.gate.set()
        await asyncio.gather(first, large)

    tried(test, max_bytes=100)


def test_who_has_no_time_left_is_not_computed():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        late, patient = await asked(batcher, rows(1.0), timeout_s=1.0) + await asked(batcher, rows(2.0), timeout_s=30.0)
        clock.now_s += 5
        model.gate.set()
        await asyncio.gather(first, patient)
        with pytest.raises(Expired):
            await late
        assert model.sizes == [1, 1]

    tried(test)


def test_who_has_left_is_not_computed_and_takes_no_room():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        there, gone = await asked(batcher, rows(1.0), rows(2.0))
        gone.cancel()
        await asyncio.sleep(0)
        (late,) = await asked(batcher, rows(3.0, 3.0))
        model.gate.set()
        await asyncio.gather(first, there, late)
        assert model.sizes == [1, 3]

    tried(test, max_requests=2)


def test_one_that_leaves_while_it_is_computed_disturbs_nobody():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        (other,) = await asked(batcher, rows(1.0))
        first.cancel()
        model.gate.set()
        assert np.array_equal((await other)["twice"], rows(2.0)["row"])

    tried(test)


class Mortal:
    """Computes when it is told to, or is lost."""

    depth = 1

    def __init__(self) -> None:
        self.inputs: list[list[float]] = []
        self.computed: asyncio.Future[Any]

    def start(self, inputs: Arrays) -> asyncio.Future[Any]:
        self.inputs.append(inputs["row"][:, 0].tolist())
        self.computed = asyncio.get_running_loop().create_future()
        return self.computed

    def compute(self) -> None:
        self.computed.set_result(Done({"twice": np.array(self.inputs[-1]) * 2}))

    def die(self) -> None:
        self.computed.set_exception(Lost("it was killed"))


def test_what_a_lost_runner_had_is_computed_by_another_each_by_itself():
    async def test() -> None:
        batcher, first, second = Batcher(), Mortal(), Mortal()
        batcher.add(first)
        (alone,) = await asked(batcher, rows(1.0))
        pair = await asked(batcher, rows(2.0), rows(3.0))
        first.compute()
        await alone
        assert first.inputs == [[1.0], [2.0, 3.0]]
        first.die()
        await asyncio.sleep(0.01)
        assert (batcher.num_runners, batcher.num_waiting) == (0, 2)
        batcher.add(second)
        for task in pair:
            second.compute()
            await task
        assert second.inputs == [[2.0], [3.0]]

    asyncio.run(asyncio.wait_for(test(), 30))


def test_what_is_lost_after_the_end_waits_no_longer_than_its_time():
    async def test() -> None:
        batcher, runner = Batcher(), Mortal()
        batcher.add(runner)
        (first,) = await asked(batcher, rows(0.0), timeout_s=0.5)
        (other,) = await asked(batcher, rows(1.0), timeout_s=0.4)
        batcher.close()
        with pytest.raises((Overloaded, Expired)):
            await other
        runner.die()
        with pytest.raises(Expired):
            await first

    asyncio.run(asyncio.wait_for(test(), 30))


class Deep(Mortal):
    """Takes batches ahead."""

    depth = 2
    sample_s = 0.001

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[asyncio.Future[Any]] = []

    def start(self, inputs: Arrays) -> asyncio.Future[Any]:
        self.under_way.append(super().start(inputs))
        return self.under_way[-1]

    def compute(self) -> None:
        oldest = self.inputs[len(self.inputs) - len(self.under_way)]
        self.under_way.pop(0).set_result(Done({"twice": np.array(oldest) * 2}, self.sample_s * len(oldest)))

    def die(self) -> None:
        for future in self.under_way:
            future.set_exception(Lost("it was killed"))


def test_a_full_batch_goes_ahead_and_is_not_held_against_its_requests_if_the_runner_is_lost():
    async def test() -> None:
        batcher, first = Batcher(Batching(max_samples=2)), Deep()
        batcher.add(first)
        tasks = await asked(batcher, *(rows(float(value)) for value in range(6)))
        assert first.inputs == [[0.0], [1.0, 2.0]] and batcher.num_waiting == 3
        first.compute()
        assert (await tasks[0])["twice"].tolist() == [0.0]
        await asyncio.sleep(0)
        assert first.inputs[2:] == [[3.0, 4.0]] and batcher.num_waiting == 1
        first.die()
        await asyncio.sleep(0.01)
        assert (batcher.num_runners, batcher.num_waiting) == (0, 5)
        second = Deep()
        batcher.add(second)
        while second.under_way:
            second.compute()
            await asyncio.sleep(0.001)
        assert sorted(second.inputs, key=len) == [[1.0], [2.0], [5.0], [3.0, 4.0]]  # only those begun go alone
        assert [answer["twice"].item() for answer in await asyncio.gather(*tasks)] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]

    asyncio.run(asyncio.wait_for(test(), 30))


def test_who_has_no_time_to_go_ahead_waits_for_whoever_is_there_sooner():
    async def test() -> None:
        clock, runner = Hands(), Deep()
        runner.sample_s = 1.0
        batcher = Batcher(Batching(max_samples=2, max_batch_s=10), clock)
        batcher.add(runner)
        (first,) = await asked(batcher, rows(0.0, 1.0))
        runner.compute()
        await first
        (under_way,) = await asked(batcher, rows(2.0, 3.0))
        (hasty,) = await asked(batcher, rows(4.0, 5.0), timeout_s=2.5)  # a batch of two takes 2
        assert len(runner.inputs) == 2 and batcher.num_waiting == 1
        runner.compute()
        await under_way
        runner.compute()
        assert (await hasty)["twice"].tolist() == [8.0, 10.0]

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_request_that_ends_every_runner_fails_and_the_others_do_not():
    async def test() -> None:
        batcher = Batcher()
        first = Mortal()
        batcher.add(first)
        (deadly,) = await asked(batcher, rows(1.0))
        (other,) = await asked(batcher, rows(2.0))
        for mortal in (first, Mortal(), Mortal()):
            if mortal is not first:
                batcher.add(mortal)
            assert mortal.inputs == [[1.0]]
            mortal.die()
            await asyncio.sleep(0.01)
        with pytest.raises(Fault, match="3 processes of the model ended on this request"):
            await deadly
        last = Mortal()
        batcher.add(last)
        last.compute()
        assert (await other)["twice"].tolist() == [4.0]

    asyncio.run(asyncio.wait_for(test(), 30))


def test_who_finds_no_runner_at_all_is_told_when_its_time_is_over():
    async def test() -> None:
        with pytest.raises(Expired):
            await Batcher().ask(rows(1.0), 0.01)

    asyncio.run(asyncio.wait_for(test(), 30))


def test_what_waits_at_the_end_is_refused_and_what_is_computed_is_answered():
    async def test() -> None:
        batcher, runner = Batcher(), Mortal()
        batcher.add(runner)
        first, waits = await asked(batcher, rows(1.0), rows(2.0))
        batcher.close()
        with pytest.raises(Overloaded, match="the server is ending"):
            await waits
        draining = asyncio.create_task(batcher.drain())
        await asyncio.sleep(0)
        runner.compute()
        await draining
        assert (await first)["twice"].tolist() == [2.0]

    asyncio.run(asyncio.wait_for(test(), 30))


def test_no_more_are_taken_than_will_be_computed_in_time():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        clock.now_s += 0.1
        model.gate.set()
        await first
        model.gate.clear()
        model.sizes.clear()
        first = await busy(model, batcher)
        waiting = await asked(batcher, rows(1.0), rows(2.0))
        with pytest.raises(Overloaded, match=r"2 requests wait, with 16 bytes, for about 0.350 s") as refused:
            await batcher.ask(rows(3.0), 1.0)
        assert refused.value.retry_after_s == pytest.approx(0.35)
        model.gate.set()
        await asyncio.gather(first, *waiting)

    tried(test, max_wait_s=0.25)


def test_who_would_wait_longer_than_he_has_is_refused_at_once():
    async def test(model, batcher, clock):
        first = await busy(model, batcher)
        clock.now_s += 0.1
        model.gate.set()
        await first
        model.gate.clear()
        model.sizes.clear()
        first = await busy(model, batcher)
        waiting = await asked(batcher, rows(1.0), rows(2.0))
        with pytest.raises(Overloaded, match=r"there is room for 512, 268435456 and 0\.32"):
            await batcher.ask(rows(3.0), 0.4)
        model.gate.set()
        await asyncio.gather(first, *waiting)

    tried(test, max_wait_s=10.0)


@pytest.mark.parametrize(
    ("bounds", "sizes"),
    [
        ({"max_batch_s": 0.05}, [1, 5, 5, 2]),
        ({"max_batch_s": 0.095}, [1, 8, 4]),  # 9 are no size that comes again and again
        ({"max_batch_s": 0.095, "max_samples": 9}, [1, 9, 3]),  # unless they are as many as may be
    ],
)
def test_a_batch_takes_no_longer_than_it_may_and_its_oldest_has(bounds, sizes):
    async def test() -> None:
        clock, runner = Hands(), Mortal()
        batcher = Batcher(Batching(**bounds), clock)
        batcher.add(runner)
        (first,) = await asked(batcher, rows(0.0))
        others = await asked(batcher, *(rows(float(value)) for value in range(12)))
        clock.now_s += 0.01
        for _ in sizes:
            runner.compute()
            await asyncio.sleep(0.01)
            clock.now_s += 0.01 * len(runner.inputs[-1])
        await asyncio.gather(first, *others)
        assert [len(inputs) for inputs in runner.inputs] == sizes

    asyncio.run(asyncio.wait_for(test(), 30))


@pytest.mark.parametrize("name", ["max_samples", "max_requests", "max_bytes"])
def test_bounds_below_1_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, not 0"):
        Batching(**{name: 0})
