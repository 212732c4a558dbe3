"""Models in processes of their own: one that ends is replaced, and nobody who asked hears of it."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from shoal.errors import ConfigError, Fault
from shoal.service.release import Pool, Release
from shoal.service.replica import Loading, Replica
from shoal.service.wire import Source
from shoal.serving.batching import Batching
from tests.service.model_process import DEADLY, NEGATIVE
from tests.service.serviced import LOADING, Heard, is_there, run, serviced


def pids(answers):
    return {int(answer.outputs["pid"][0]) for answer in answers}


def test_requests_are_answered_by_all_processes_of_a_version():
    async def test():
        async with serviced({3: "good"}, num_replicas=2) as service:
            answers = [await service.ask(1.0) for _ in range(20)]
            assert {float(answer.outputs["sum"][0]) for answer in answers} == {4.0}
            assert pids(answers) == set(service.conductor.status()["loaded"][3]["pids"])

    run(test)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_nobody_who_asks_hears_that_processes_are_killed(num_replicas: int):
    async def test():
        async with serviced({1: "slow"}, num_replicas=num_replicas) as service:
            for _ in range(3):
                asking = [asyncio.create_task(service.ask(float(n))) for n in range(8)]
                await asyncio.sleep(0.02)
                loaded = service.conductor.status()["loaded"][1]["pids"]
                os.kill(loaded[0], signal.SIGKILL)
                answers = await asyncio.gather(*asking)
                assert [float(answer.outputs["sum"][0]) for answer in answers] == [n + 1.0 for n in range(8)]
                assert num_replicas == 1 or len(pids(answers)) > 0
            kinds = [event["kind"] for event in service.events]
            assert kinds.count("replica_lost") == 3

    run(test)


def test_a_request_that_ends_every_process_fails_and_the_service_stays():
    async def test():
        async with serviced({1: "good"}) as service:
            deadly = asyncio.create_task(service.ask(DEADLY))
            with pytest.raises(Fault, match="3 processes of the model ended on this request"):
                await deadly
            assert float((await service.ask(1.0)).outputs["sum"][0]) == 2.0

    run(test)


def test_a_frozen_process_is_replaced_and_its_request_answered_by_another():
    async def test():
        async with serviced({1: "good"}, loading=replace(LOADING, compute_s=1.0)) as service:
            (frozen,) = pids([await service.ask(1.0)])
            os.kill(frozen, signal.SIGSTOP)
            answer = await service.ask(2.0)
            assert float(answer.outputs["sum"][0]) == 3.0 and pids([answer]) != {frozen}
            await service.until("replica_replaced", 1)
        assert not is_there(frozen)

    run(test)


def test_what_a_model_raises_is_told_and_its_process_goes_on():
    async def test():
        async with serviced({1: "good"}) as service:
            before = await service.ask(1.0)
            with pytest.raises(Fault, match="ValueError: it cannot bear this"):
                await service.ask(NEGATIVE)
            assert pids([before]) == pids([await service.ask(1.0)])

    run(test)


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        ("crash", Fault, "ended while it loaded"),
        ("refused", ConfigError, "does not fit the task's model"),
        ("hang", Fault, "not loaded within 3.0 s"),
    ],
)
def test_a_model_that_cannot_be_loaded_leaves_no_process(kind: str, error: type[Exception], reason: str):
    async def test():
        pool = Pool(replace(LOADING, most_s=3.0))
        replica = await Replica.begin(pool.loading)
        await pool.give_back(replica)
        with pytest.raises(error, match=reason):
            await Release.open(Source(kind, 1), pool, 1, Batching(), Heard())
        assert not is_there(replica.pid)
        await pool.close()

    run(test)


def test_a_process_that_is_still_at_something_is_not_used_for_another_version():
    async def test():
        pool = Pool(LOADING)
        first = await pool.take(Source("good", 1))
        await first.load(Source("good", 1))
        os.kill(first.pid, signal.SIGSTOP)
        first.start({"number": np.array([1.0], np.float32)})
        await pool.give_back(first)
        second = await pool.take(Source("good", 2))
        assert second is not first
        os.kill(first.pid, signal.SIGCONT)
        await second.end()
        await pool.close()

    run(test)


def test_a_process_that_does_not_come_up_is_told():
    async def test():
        with pytest.raises(Fault, match="a process for a model has ended; its output above says why"):
            await Replica.begin(Loading(command=["/bin/false"]))

    run(test)


def test_all_processes_end_with_the_service():
    async def test():
        async with serviced({1: "good"}, num_replicas=2) as service:
            await service.ask(1.0)
            loaded = service.conductor.status()["loaded"][1]["pids"]
        assert not [pid for pid in loaded if is_there(pid)]

    run(test)


def test_a_process_ends_with_a_service_that_was_killed():
    async def test():
        replica = await Replica.begin(LOADING)
        os.close(replica._lifeline)  # as the kernel does
        replica._lifeline = -1
        assert await asyncio.wait_for(replica._process.wait(), 30) == 1
        await replica.end()

    run(test)


def test_a_terminal_s_signals_are_the_service_s():
    async def test():
        replica = await Replica.begin(LOADING)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(replica.pid, number)
        await replica.load(Source("good", 1))
        await replica.end()

    run(test)
