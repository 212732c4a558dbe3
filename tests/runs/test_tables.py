"""Runs with tables: what faults do to them, that a version holds tables and parameters of one step; reading them."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import pytest
import torch

import shoal
from shoal.comm import messages as msg
from shoal.errors import ConfigError, StoreFault
from shoal.events import read_events
from shoal.launch.run import runs_folder
from shoal.shards.reading import stored_tables
from shoal.tables.spec import NUM_BUCKETS
from shoal.testing import FaultPlan
from shoal.training.commanding import command
from shoal.training.folder import RunFolder
from tests.runs.tabled import GLOBAL_BATCH, NUM_SAMPLES, job

pytestmark = pytest.mark.cluster

QUIET = shoal.TrainOptions(quiet=True)
STEPS = NUM_SAMPLES // GLOBAL_BATCH


def tables_of(run: shoal.Run, step: int) -> dict[str, Any]:
    """All that they hold, by id."""
    stored = stored_tables(run.path, step)
    found: dict[str, Any] = {}
    for name in ("users", "tags", "counts"):
        parts = [table.image().by_id() for table in stored.tables(name)]
        rows = {
            int(i): row.tobytes() for part in parts for i, row in zip(part.ids[part.counts > 0], part.rows, strict=True)
        }
        waiting = {int(i): int(n) for part in parts for i, n in zip(part.ids, part.counts, strict=True) if n < 0}
        found[name] = rows, waiting
    return found


def run_of(plan: FaultPlan, name: str, workers: int = 3, **changes: Any) -> shoal.Run:
    folder = RunFolder((runs_folder() / name).resolve())
    with plan.befalling(folder) as inflicted:
        run = shoal.train(dataclasses.replace(job, **changes), workers=workers, name=name, options=QUIET)
    assert [hit.fault for hit in inflicted] == list(plan.faults)
    assert run.outcome == "done"
    return run


STORM = (
    FaultPlan().kill(at_step=12, rank=1).kill_shard(at_step=30, number=1).kill(at_step=50)
    .kill_shard(at_step=70, number=0).kill(at_step=71, rank=2).kill_coordinator(at_step=90)
)  # fmt: skip


def check_counts(run: shoal.Run) -> Any:
    """Each sample was committed once; the model."""
    model: Any = shoal.load_model(run, job=job)
    counts = -model.counts(torch.arange(NUM_SAMPLES)).detach() * GLOBAL_BATCH
    assert (counts == 1).all()
    assert shoal.account(run, job=job).lost == 0
    return model


@pytest.mark.parametrize(
    "strategy", [shoal.Hybrid(shards=2), shoal.ParameterServer(shoal.Sync(), shards=2, round_steps=4)],
    ids=["hybrid", "parameter server in step"],
)  # fmt: skip
def test_killed_shards_and_workers_change_no_bit_of_the_tables(strategy):
    calm = run_of(FaultPlan(), "calm", workers=1)
    stormy = run_of(STORM, "stormy", strategy=strategy)
    assert tables_of(stormy, STEPS) == tables_of(calm, STEPS)
    model = check_counts(stormy)
    assert model.bias.item() == pytest.approx(-0.1 * STEPS, rel=1e-5)


@pytest.mark.parametrize(
    "consistency", [shoal.Async(), shoal.Async(max_in_flight=3), shoal.Bounded(2)],
    ids=["async", "async, 3 in flight", "bounded"],
)  # fmt: skip
def test_without_waiting_for_each_other_each_sample_is_applied_once(consistency):
    strategy = shoal.ParameterServer(consistency, shards=2, round_steps=4)
    model = check_counts(run_of(STORM, "stormy", strategy=strategy))
    assert model.bias.item() == pytest.approx(-0.1 * STEPS, rel=1e-5)


@pytest.mark.parametrize(
    "strategy",
    [shoal.Hybrid(shards=2, durability="replica"),
     shoal.ParameterServer(shoal.Sync(), shards=3, round_steps=4, durability="replica")],
    ids=["hybrid", "parameter server in step"],
)  # fmt: skip
def test_with_replicas_shards_that_are_lost_with_their_disk_or_frozen_change_no_bit(strategy):
    calm = run_of(FaultPlan(), "calm", workers=1)
    plan = (
        FaultPlan().lose_shard(at_step=20, number=1).kill(at_step=40, rank=1).freeze_shard(at_step=60, number=0)
        .lose_shard(at_step=90, number=0)
    )  # fmt: skip
    stormy = run_of(plan, "stormy", strategy=strategy, patience=shoal.Patience(silent_s=2.0))
    assert not any(event["kind"] in ("fell_back", "failed") for event in stormy.events)
    assert tables_of(stormy, STEPS) == tables_of(calm, STEPS)
    check_counts(stormy)


def buckets_of(run: shoal.Run) -> list[int]:
    """How many each shard had at the end."""
    last = [event["shards"] for event in run.events if event["kind"] == "tables"][-1]
    return sorted(shard["buckets"] for shard in last.values())


@pytest.mark.parametrize(
    ("strategy", "number"),
    [(shoal.Hybrid(shards=2), 3), (shoal.Hybrid(shards=3, durability="replica"), 2),
     (shoal.ParameterServer(shoal.Async(), shards=2, round_steps=4), 3)],
    ids=["hybrid, one more", "hybrid with replicas, one less", "async, one more"],
)  # fmt: skip
def test_buckets_move_while_a_run_goes_on_and_it_resumes_with_them(strategy, number):
    folder = RunFolder((runs_folder() / "stormy").resolve())
    watcher = threading.Thread(target=stop_once_it_has, args=(folder, number))
    watcher.start()
    plan = FaultPlan().scale_shards(number, at_step=3).kill(at_step=10, rank=1)
    with plan.befalling(folder) as inflicted:
        changed = dataclasses.replace(job, strategy=strategy, epochs=100)
        stormy = shoal.train(changed, workers=3, name="stormy", options=QUIET)
    watcher.join()
    assert stormy.outcome == "stopped" and len(inflicted) == 2
    assert len(buckets_of(stormy)) == number and sum(buckets_of(stormy)) == NUM_BUCKETS
    assert buckets_of(stormy)[0] > NUM_BUCKETS // number - 100
    epochs = max(event["step"] for event in stormy.events if event["kind"] == "stored") // STEPS + 1
    done = shoal.resume(stormy.name, job=changed, settings=[f"epochs={epochs}"], options=QUIET)
    assert len(buckets_of(done)) == number and shoal.account(done, job=changed).lost == 0
    model: Any = shoal.load_model(done, job=changed)
    assert (-model.counts(torch.arange(NUM_SAMPLES)).detach() * GLOBAL_BATCH == epochs).all()
    if isinstance(strategy, shoal.Hybrid):
        calm = run_of(FaultPlan(), "calm", workers=1, epochs=epochs)
        assert tables_of(done, epochs * STEPS) == tables_of(calm, epochs * STEPS)


def stop_once_it_has(folder: RunFolder, number: int) -> None:
    """Stop a run once so many shards have all buckets, and a worker was lost."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        events = read_events(folder.events_path)[0] if folder.events_path.exists() else []
        told = [event["shards"] for event in events if event["kind"] == "tables"]
        has_moved = told and len(told[-1]) == number and all(shard.get("buckets") for shard in told[-1].values())
        if has_moved and any(event["kind"] == "lost" for event in events):
            break
        time.sleep(0.05)
    command(folder, msg.Stop(reason="the test has seen enough"))


@pytest.mark.parametrize(
    "strategy",
    [shoal.Hybrid(shards=2, durability="snapshot"),
     shoal.ParameterServer(shoal.Async(), shards=2, round_steps=5, durability="snapshot")],
    ids=["hybrid", "async"],
)  # fmt: skip
def test_without_a_log_a_killed_shard_takes_the_run_back_to_the_version_that_is_stored(strategy):
    calm = run_of(FaultPlan(), "calm", workers=1)
    plan = FaultPlan().kill_shard(at_step=60, number=1).kill(at_step=90, rank=1)
    stormy = run_of(plan, "stormy", strategy=strategy)
    if isinstance(strategy, shoal.Hybrid):
        assert any(event["kind"] == "fell_back" for event in stormy.events)
        assert tables_of(stormy, STEPS) == tables_of(calm, STEPS)
    check_counts(stormy)


def test_tables_that_are_gone_end_a_run_that_is_resumed():
    first = run_of(FaultPlan(), "first", workers=2, epochs=None, steps=60)
    for file in (first.path / "shards" / "s1").iterdir():
        file.unlink()
    with pytest.raises(shoal.ShoalError, match="cannot stand at step 60, which is what is stored"):
        shoal.resume(first.name, job=job, settings=["epochs=1"], options=QUIET)


def test_a_run_that_is_resumed_goes_on_from_its_version_with_the_tables_of_that():
    calm = run_of(FaultPlan(), "calm", workers=1)
    first = run_of(FaultPlan(), "first", workers=2, epochs=None, steps=60)
    assert tables_of(first, 50) != tables_of(first, 60)
    for file in (first.path / "versions").glob("*60*/*.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="add --from-step 50"):
        shoal.resume(first.name, job=job, options=QUIET)
    done = shoal.resume(first.name, job=job, workers=3, from_step=50, settings=["epochs=1"], options=QUIET)
    assert done.outcome == "done"
    assert tables_of(done, STEPS) == tables_of(calm, STEPS)


def test_a_run_evaluates_and_predicts_with_its_tables():
    run = run_of(FaultPlan(), "read", workers=2)
    trained = next(e for e in reversed(run.events) if e["kind"] == "evaluated")["figures"]
    assert shoal.evaluate(run, job=job)["mean"] == pytest.approx(trained["mean"])
    assert trained["mean"] != pytest.approx(shoal.evaluate(run, job=job, version=100)["mean"])
    noted = [event for event in run.events if event["kind"] == "tables"]
    assert sum(shard["table/counts"]["rows"] for shard in noted[-1]["shards"].values()) == NUM_SAMPLES
    with pytest.raises(StoreFault, match="does not hold the tables of step 3: 4096 of their buckets are missing"):
        stored_tables(run.path, 3)
    more = shoal.resume(run.name, job=job, settings=["epochs=3", "strategy.shards=3"], options=QUIET)
    assert len(buckets_of(more)) == 3 and shoal.account(more, job=job).lost == 0
    model: Any = shoal.load_model(more, job=job)
    assert (-model.counts(torch.arange(NUM_SAMPLES)).detach() * GLOBAL_BATCH == 3).all()


@pytest.mark.parametrize("strategy", [shoal.Hybrid, shoal.ParameterServer])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"shards": 0}, "from 1 to 1024, not 0"),
        ({"durability": "disk"}, "must be one of snapshot, log, replica, not 'disk'"),
        ({"durability": "replica"}, "needs shards=2 or more: each keeps a copy of another"),
    ],
)
def test_shards_that_there_cannot_be_are_refused(strategy, how, message):
    with pytest.raises(ConfigError, match=message):
        strategy(**how)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (shoal.AllReduce(), "no shards for them; use Hybrid or ParameterServer"),
        (shoal.LocalSGD(sync_every_steps=4), "use Hybrid"),
    ],
)
def test_a_model_with_tables_needs_a_strategy_with_shards(strategy, message):
    with pytest.raises(ConfigError, match=message):
        shoal.train(dataclasses.replace(job, strategy=strategy), options=QUIET)
