"""Versions take turns, and those that should not answer do not."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from shoal.errors import ConfigError, Fault
from shoal.rollout import Policy, Threshold
from shoal.serving.answering import NotReady, Unknown
from tests.service.model_process import WRONG
from tests.service.serviced import ACCURATE, LOADING, QUICK, Serviced, is_there, run, serviced

GATED = replace(QUICK, gates=(ACCURATE,))


async def asked_all_the_while(service: Serviced, until: asyncio.Task) -> list[int]:
    """The versions that answered."""
    versions = []
    while not until.done():
        versions.append((await service.ask(2.0)).version)
        await asyncio.sleep(0.001)
    await until
    return versions


def test_each_new_version_is_taken_and_no_request_fails():
    async def test():
        async with serviced({1: "good"}, GATED) as service:

            async def swaps():
                for version in range(2, 6):
                    service.store(version)
                    await service.until("promoted", version)

            versions = await asked_all_the_while(service, asyncio.create_task(swaps()))
            assert versions == sorted(versions) and {1, 5} <= {*versions, (await service.ask()).version}

    run(test)


BAD = {
    "worse": "gate_refused: accuracy >= live -0.01: 0.5 where >= 0.891 is needed",
    "unmeasured": "gate_refused: metrics: ValueError: no data",
    "misnamed": "gate_refused: metrics: there is no such column",
    "skewed": "gate_refused: skew: of 2 training samples",
    "broken": "gate_refused: replay: 1 of 1 requests failed: ValueError: it cannot bear this",
    "wider": "gate_refused: signature: ",
    "crowded": "load_refused: adds fails on 16 samples at once: MemoryError()",
    "crash": "load_refused: the model's process ended while it loaded",
    "refused": "load_refused: it does not fit the task's model",
    "hang": "load_refused: the model was not loaded within 5.0 s",
}


def test_bad_versions_are_refused_with_their_reasons_and_the_next_good_one_is_taken():
    async def test():
        async with serviced({1: "good"}, GATED, loading=replace(LOADING, most_s=5.0)) as service:
            await service.ask(2.0)
            for version, (kind, expected) in enumerate(BAD.items(), 2):
                event, _, reason = expected.partition(": ")
                service.store(version, kind)
                refused = await service.until(event, version)
                assert any(why.startswith(reason) for why in refused["reasons"]), refused
                assert service.conductor.state.live == 1
            assert (await service.ask()).version == 1
            service.store(50)
            await service.until("promoted", 50)
            assert (await service.ask()).version == 50

    run(test)


def test_a_gate_that_does_not_end_refuses_and_the_next_good_version_is_taken():
    async def test():
        async with serviced({1: "good"}, replace(GATED, gate_s=15.0)) as service:
            service.store(2, "endless")
            (pid,) = (await service.until("loaded", 2))["pids"]
            refused = await service.until("gate_refused", 2)
            assert refused["reasons"][0].startswith("time: after 15 s the gate was still at metrics: give it longer")
            service.store(3)
            await service.until("promoted", 3)
            assert (await service.ask()).version == 3
            while is_there(pid):  # killed, until it is reaped
                await asyncio.sleep(0.01)

    run(test)


def test_a_candidate_that_is_measured_without_end_can_be_promoted_and_answers_at_once():
    async def test():
        async with serviced({1: "good"}, GATED) as service:
            service.store(2, "endless")
            (pid,) = (await service.until("loaded", 2))["pids"]
            promoting = asyncio.create_task(service.conductor.promote(2))
            versions = await asked_all_the_while(service, promoting)
            answer = await service.ask()
            assert set(versions) <= {1, 2} and answer.version == 2 and int(answer.outputs["pid"][0]) != pid

    run(test)


def test_what_comes_after_one_that_was_promoted_unmeasured_is_compared_with_what_was_before_it():
    async def test():
        async with serviced({1: "good"}, GATED) as service:
            service.store(2, "endless")
            await service.until("loaded", 2)
            await service.conductor.promote(2)
            service.store(3, "worse")
            reasons = (await service.until("gate_refused", 3))["reasons"]
            assert any("0.5 where >=" in reason for reason in reasons)

    run(test)


def test_a_process_that_measures_without_end_is_not_used_for_another_version():
    async def test():
        async with serviced({1: "good"}, GATED) as service:
            service.store(2, "endless")
            (pid,) = (await service.until("loaded", 2))["pids"]
            for version in (3, 4):
                service.store(version)
                await service.conductor.promote(version)
                assert service.conductor.status()["loaded"][version]["pids"] != [pid]
            while is_there(pid):  # killed, until it is reaped
                await asyncio.sleep(0.01)

    run(test)


class Faulty(Threshold):
    """A check with a mistake in it: it can bear no bad figure."""

    def check(self, figures, live):
        if figures["accuracy"] < 0.9:
            raise KeyError("bound")
        return super().check(figures, live)


def test_a_fault_of_the_service_itself_is_a_refusal_and_the_next_good_version_is_taken(caplog):
    async def test():
        policy = replace(QUICK, gates=(Faulty("accuracy", "at_least", 0.0),))
        async with serviced({1: "good"}, policy) as service:
            service.shelf.faults[2] = RuntimeError("an index that is none")
            service.store(2)
            refused = await service.until("load_refused", 2)
            assert refused["reasons"] == ["RuntimeError: an index that is none"]
            service.store(3, "worse")
            refused = await service.until("gate_refused", 3)
            assert refused["reasons"] == ["gate: KeyError: 'bound'"]
            service.store(4)
            await service.until("promoted", 4)
            assert (await service.ask()).version == 4

    run(test)
    raised = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert raised == ["an index that is none", "'bound'"]


def test_a_run_whose_versions_cannot_be_read_for_a_while_is_followed_after_that(caplog):
    async def test():
        async with serviced({1: "good"}) as service:
            service.shelf.trouble = KeyError("steps")
            while "the run's versions cannot be read: KeyError: 'steps'" not in caplog.messages:
                await asyncio.sleep(0.01)
            service.shelf.trouble = None
            service.store(2)
            await service.until("promoted", 2)

    run(test)


def test_a_version_that_fails_on_requests_is_refused_in_its_canary_and_nobody_hears_of_it():
    async def test():
        policy = Policy(shadow_requests=0, canary_shares=(0.5,), canary_requests=1000, stage_s=60.0)
        async with serviced({1: "good"}, policy) as service:
            service.store(2, "tires")
            refusing = asyncio.create_task(service.until("canary_refused", 2))
            versions = await asked_all_the_while(service, refusing)
            assert set(versions) == {1, 2} and versions[-1] == 1
            assert "ValueError: it is tired" in (await refusing)["reasons"][0]

    run(test)


def test_a_slow_version_is_refused_in_the_shadow_where_nobody_waits_for_it():
    async def test():
        policy = Policy(shadow_requests=10, canary_shares=(), stage_s=60.0)
        async with serviced({1: "good"}, policy) as service:
            service.store(2, "slow")
            refusing = asyncio.create_task(service.until("shadow_refused", 2))
            begun_s, versions = time.monotonic(), await asked_all_the_while(service, refusing)
            assert set(versions) == {1} and len(versions) > 10
            assert (await refusing)["reasons"][0].startswith("latency: a median of ")
            assert time.monotonic() - begun_s < 60

    run(test)


def test_a_good_version_goes_through_all_stages():
    async def test():
        policy = Policy(shadow_requests=10, canary_shares=(0.2, 0.6), canary_requests=10, max_differing=1.0)
        async with serviced({1: "good"}, policy) as service:
            service.store(2)
            versions = await asked_all_the_while(service, asyncio.create_task(service.until("promoted", 2)))
            assert {1, 2} == set(versions)
            told = [event["kind"] for event in service.events if event.get("version") == 2]
            assert told == [
                "candidate", "loaded", "gate_passed", "shadow", "shadow_passed", "canary", "canary_passed", "canary",
                "canary_passed", "promoted",
            ]  # fmt: skip

    run(test)


def test_a_live_version_that_begins_to_fail_is_rolled_back():
    async def test():
        async with serviced({1: "good"}, replace(QUICK, canary_requests=5)) as service:
            service.store(2, "broken")
            await service.until("promoted", 2)
            rolling = asyncio.create_task(service.until("rolled_back", 2))
            while not rolling.done():
                with pytest.raises(Fault) if (service.switch.live.version == 2) else pytest.MonkeyPatch.context():
                    await service.ask(2.0)
            assert (await service.ask(2.0)).version == 1

    run(test)


def test_an_asker_s_mistakes_are_told_and_held_against_no_version():
    async def test():
        policy = Policy(shadow_requests=0, canary_shares=(0.5,), canary_requests=10, stage_s=60.0)
        async with serviced({1: "good"}, policy) as service:
            service.store(2)
            promoted = asyncio.create_task(service.until("promoted", 2))
            while not promoted.done():
                with pytest.raises(ConfigError, match="there is no such number"):
                    await service.ask(WRONG)
                await service.ask(2.0)
            assert (await promoted)["version"] == 2
            assert not [event for event in service.events if event["kind"].endswith("_refused")]

    run(test)


def test_somebody_rolls_back_and_promotes():
    async def test():
        async with serviced({1: "good"}) as service:
            service.store(2)
            await service.until("promoted", 2)
            service.conductor.rollback()
            assert (await service.ask()).version == 1
            with pytest.raises(ConfigError, match="no version before the live one is loaded"):
                service.conductor.rollback()
            await service.conductor.promote(2)
            assert (await service.ask()).version == 2
            with pytest.raises(ConfigError, match="version 9 is not stored"):
                await service.conductor.promote(9)
            service.store(3, "crash")
            with pytest.raises(Fault, match=r"version 3 cannot be served: .*ended while it loaded"):
                await service.conductor.promote(3)
            assert (await service.ask()).version == 2

    run(test)


def test_a_version_can_be_asked_for_by_its_number_while_it_is_loaded():
    async def test():
        async with serviced({1: "good"}) as service:
            service.store(2)
            await service.until("promoted", 2)
            assert float((await service.ask(1.0, version=1)).outputs["sum"][0]) == 2.0
            with pytest.raises(Unknown, match="version 7 is not served"):
                await service.ask(1.0, version=7)

    run(test)


def test_processes_of_a_version_that_is_not_needed_are_used_again():
    async def test():
        async with serviced({1: "good"}) as service:
            seen = set()
            for version in range(2, 7):
                service.store(version)
                await service.until("promoted", version)
                seen |= set(service.conductor.status()["loaded"][version]["pids"])
            assert len(seen) < 5
        assert not [pid for pid in seen if is_there(pid)]

    run(test)


def test_a_service_that_follows_waits_for_the_first_version():
    async def test():
        async with serviced({}) as service:
            assert not service.switch.is_ready()
            with pytest.raises(NotReady, match="no version is served yet"):
                await service.ask()
            service.store(1)
            await service.until("promoted", 1)
            assert service.switch.is_ready()

    run(test)


@pytest.mark.parametrize(
    ("kinds", "error", "reason"),
    [({}, ConfigError, "no version is stored yet"), ({1: "crash"}, Fault, "version 1 cannot be served: .*ended while")],
)
def test_a_service_that_does_not_follow_says_why_it_cannot_start(kinds, error, reason):
    async def test():
        with pytest.raises(error, match=reason):
            async with serviced(kinds, follows=False):
                pass

    run(test)


def test_a_service_has_started_with_its_first_version_whatever_comes_after_it():
    async def test():
        async with serviced({1: "good"}) as service:
            service.store(2, "hang")
            await service.until("candidate", 2)
            await service.conductor.start()  # as another would, meanwhile
            assert (await service.ask()).version == 1

    run(test)
