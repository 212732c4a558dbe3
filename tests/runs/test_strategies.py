"""What holds of every strategy: exactly once, one history, resumed as if never stopped, whatever befalls a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

import shoal
from shoal.launch.run import runs_folder
from shoal.strategies import Strategy
from shoal.testing import Fault, FaultPlan
from shoal.training.folder import RunFolder
from tests.runs.counting import NUM_SAMPLES, job, num_commits
from tests.runs.told import behind, of_kind

pytestmark = pytest.mark.cluster

QUIET = shoal.TrainOptions(quiet=True)
AVERAGE = shoal.Nesterov(lr=1.0, momentum=0.0)
GRADIENTS: dict[str, Strategy] = {
    "delayed": shoal.AllReduce(delay=1),
    "int8": shoal.AllReduce(codec=shoal.Int8(), uncompressed=("counts",)),
    "powersgd": shoal.AllReduce(codec=shoal.PowerSGD(), uncompressed=("counts",)),
    "onebit, delayed": shoal.AllReduce(codec=shoal.OneBit(), uncompressed=("counts",), delay=1),
}
ROUNDS: dict[str, Strategy] = {
    "local": shoal.LocalSGD(sync_every_steps=5),
    "diloco": shoal.DiLoCo(sync_every_steps=5, outer=AVERAGE),
    "streaming, onebit": shoal.DiLoCo(
        sync_every_steps=5, outer=AVERAGE, codec=shoal.OneBit(), uncompressed=("counts",), fragments=2, overlap_steps=3
    ),
}
ALL = GRADIENTS | ROUNDS
TRIED = ("onebit, delayed", "local", "streaming, onebit")
"""Those that have all there is to lose: gradients under way, local steps, residuals, an outer optimizer."""


def job_with(strategy: Strategy) -> shoal.Job:
    return dataclasses.replace(job, strategy=strategy, patience=shoal.Patience(collective_s=5.0))


@pytest.fixture(name="befallen", params=[ALL[name] for name in TRIED], ids=TRIED)
def _befallen(request: pytest.FixtureRequest) -> Callable[[FaultPlan], shoal.Run]:
    """A run with one of all strategies, that all of a plan befell. It is done, and each sample was committed once."""

    def train(plan: FaultPlan) -> shoal.Run:
        folder = RunFolder((runs_folder() / "befallen").resolve())
        chosen = job_with(request.param)
        with plan.befalling(folder) as inflicted:
            run = shoal.train(chosen, workers=3, name=folder.name, options=QUIET)
        assert [hit.fault for hit in inflicted] == list(plan.faults)
        assert run.outcome == "done"
        check_counts(run, chosen)
        return run

    return train


def check_counts(run: shoal.Run, chosen: shoal.Job) -> None:
    """Each sample shows in the model. In a mean over the samples of fewer workers it shows as more than one, over those
    that are made up for as less; that none shows twice is then for the ledger to tell."""
    commits = num_commits(shoal.load_model(run, job=chosen))
    account = shoal.account(run, job=chosen)
    assert (account.taken, account.lost, account.repeated) == (NUM_SAMPLES, 0, 0)
    if isinstance(chosen.strategy, shoal.AllReduce):
        assert commits.eq(1).all()
    else:
        assert commits.min() > 0.3


@pytest.mark.parametrize("strategy", ALL.values(), ids=ALL.keys())
def test_an_undisturbed_run_commits_each_sample_once(strategy):
    chosen = job_with(strategy)
    run = shoal.train(chosen, workers=3, options=QUIET)
    assert num_commits(shoal.load_model(run, job=chosen)).sub(1).abs().max() < 0.5
    assert len(of_kind(run, "generation")) == 1


def test_a_killed_worker_is_replaced_and_its_successor_heals(befallen):
    run = befallen(FaultPlan().kill(at_step=20, rank=1))
    assert [event["worker"] for event in of_kind(run, "lost")] == ["w1"]
    assert sorted(event["worker"] for event in of_kind(run, "healed")) == sorted({"w3"} | behind(run))


def test_a_round_that_loses_a_worker_commits_what_the_others_did():
    seldom = shoal.Storing(every_s=None, every_steps=10_000)
    chosen = dataclasses.replace(job_with(shoal.LocalSGD(sync_every_steps=20)), storing=seldom, log_every_steps=1)
    folder = RunFolder((runs_folder() / "round").resolve())
    with FaultPlan().kill(at_step=40, rank=1).befalling(folder):
        run = shoal.train(chosen, workers=3, name=folder.name, options=QUIET)
    lossy, *later = [e for e in of_kind(run, "participation") if e["lagging_lanes"]]
    before = [e["members"] for e in of_kind(run, "generation") if e["at_s"] <= lossy["at_s"]]
    assert (lossy["alive"], lossy["committed"], lossy["lagging_lanes"]) == (len(before[-1]), 2, 21)
    assert set(before[-1]) - {"w3"} == {"w0", "w2"}, "its replacement may be there already, to catch up"
    assert not later, "what the lost worker left is made up for in the next round"
    told = [e["step"] for e in of_kind(run, "progress")]
    assert told[told.index(lossy["step"]) + 1] == lossy["step"] + 10, "which is half as long"
    check_counts(run, chosen)


def test_the_leader_and_another_are_killed(befallen):
    befallen(FaultPlan().kill(at_step=30, rank=0).kill(at_step=40, rank=1))


def test_a_second_is_killed_while_the_first_heals(befallen):
    befallen(FaultPlan().kill(at_step=20).add(Fault("kill_healing", 20)))


def test_a_frozen_worker_is_expelled(befallen):
    run = befallen(FaultPlan().freeze(at_step=20, rank=1))
    assert [(event["worker"], event["expelled"]) for event in of_kind(run, "dismissed")] == [("w1", True)]


def test_who_leaves_is_not_lost(befallen):
    run = befallen(FaultPlan().leave(at_step=20, rank=1))
    assert not of_kind(run, "lost")


def test_workers_go_on_under_a_replaced_coordinator(befallen):
    run = befallen(FaultPlan().kill_coordinator(at_step=20))
    assert not of_kind(run, "lost")


def test_a_run_grows_and_shrinks(befallen):
    run = befallen(FaultPlan().scale(5, at_step=20).scale(2, at_step=60))
    sizes = [len(event["members"]) for event in of_kind(run, "generation")]
    assert max(sizes) == 5 and sizes[-1] == 2
