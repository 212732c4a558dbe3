"""Whatever befalls a run, each sample is committed once and the result is that of a run that nothing befell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
from torch import nn

import shoal
from shoal.launch.run import runs_folder
from shoal.testing import Fault, FaultPlan
from shoal.training.folder import RunFolder
from tests.runs.counting import job, num_commits
from tests.runs.told import behind, of_kind

pytestmark = pytest.mark.cluster

QUIET = shoal.TrainOptions(quiet=True)
WORKERS = 3


@pytest.fixture(scope="module", name="undisturbed")
def _undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nn.Module]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_RUNS", str(tmp_path_factory.mktemp("undisturbed")))
        run = shoal.train(job, workers=WORKERS, options=QUIET)
        yield shoal.load_model(run, job=job)


@pytest.fixture(name="befallen")
def _befallen(undisturbed: nn.Module) -> Callable[[FaultPlan], shoal.Run]:
    """A run that all of a plan befell. It is done, and no result shows it."""

    def train(plan: FaultPlan) -> shoal.Run:
        folder = RunFolder((runs_folder() / "befallen").resolve())
        with plan.befalling(folder) as inflicted:
            run = shoal.train(job, workers=WORKERS, name=folder.name, options=QUIET)
        assert [hit.fault for hit in inflicted] == list(plan.faults)
        assert run.outcome == "done"
        model = shoal.load_model(run, job=job)
        assert num_commits(model).eq(1).all()
        mine, theirs = model.net.state_dict(), undisturbed.net.state_dict()
        assert max((mine[name] - theirs[name]).abs().max().item() for name in mine) < 1e-4
        return run

    return train


def test_an_undisturbed_run_commits_each_sample_once(undisturbed):
    assert num_commits(undisturbed).eq(1).all()


PLANS = {
    "the leader is killed": FaultPlan().kill(at_step=30, rank=0),
    "two are killed together": FaultPlan().kill(at_step=30, rank=0).kill(at_step=30, rank=1),
    "all are killed together": FaultPlan().kill(at_step=40, rank=0).kill(at_step=40, rank=1).kill(at_step=40, rank=2),
    "one is killed while it heals": FaultPlan().kill(at_step=20).add(Fault("kill_healing", 20)),
    "one is killed with the coordinator": FaultPlan().kill_coordinator(at_step=30).kill(at_step=30, rank=1),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_each_sample_is_committed_once_although(befallen, plan):
    befallen(plan)


def test_a_killed_worker_is_replaced_and_its_successor_heals(befallen):
    run = befallen(FaultPlan().kill(at_step=20, rank=1))
    assert [event["worker"] for event in of_kind(run, "lost")] == ["w1"]
    assert sorted(event["worker"] for event in of_kind(run, "healed")) == sorted({"w3"} | behind(run))
    assert of_kind(run, "generation")[-1]["members"] == ["w0", "w2", "w3"]


def test_a_frozen_worker_is_expelled_and_replaced(befallen):
    run = befallen(FaultPlan().freeze(at_step=20, rank=1))
    assert [(event["worker"], event["expelled"]) for event in of_kind(run, "dismissed")] == [("w1", True)]
    assert of_kind(run, "generation")[-1]["members"] == ["w0", "w2", "w3"]


def test_who_leaves_is_not_lost(befallen):
    run = befallen(FaultPlan().leave(at_step=20, rank=1))
    assert [event["worker"] for event in of_kind(run, "leave_asked")] == ["w1"]
    assert [(event["worker"], event["expelled"]) for event in of_kind(run, "dismissed")] == [("w1", False)]
    assert not of_kind(run, "lost")


def test_workers_attach_to_the_replacement_of_a_killed_coordinator(befallen):
    run = befallen(FaultPlan().kill_coordinator(at_step=20))
    assert {event["worker"] for event in of_kind(run, "attached")} == {"w0", "w1", "w2"}
    assert not of_kind(run, "lost")


def test_a_run_grows_and_shrinks_at_steps(befallen):
    run = befallen(FaultPlan().scale(5, at_step=20).scale(2, at_step=60))
    sizes = [len(event["members"]) for event in of_kind(run, "generation")]
    assert sizes[0] == 3 and max(sizes) == 5 and sizes[-1] == 2
    assert not of_kind(run, "lost")


def test_a_frozen_coordinator_is_replaced(befallen, monkeypatch):
    monkeypatch.setattr("shoal.launch.driver._COORDINATOR_SILENT_S", 0.5)
    run = befallen(FaultPlan().freeze_coordinator(at_step=20))
    assert len(of_kind(run, "coordinator_replaced")) == 1


def test_what_the_last_worker_holds_is_stored_before_it_leaves():
    seldom = dataclasses.replace(job, storing=shoal.Storing(every_s=None, every_steps=10_000))
    folder = RunFolder((runs_folder() / "lonely").resolve())
    with FaultPlan().leave(at_step=20).befalling(folder):
        run = shoal.train(seldom, workers=1, name=folder.name, options=QUIET)
    _, second = of_kind(run, "generation")
    assert (second["origin"], second["base_step"] >= 20) == ("store", True)
    assert num_commits(shoal.load_model(run, job=job)).eq(1).all()
