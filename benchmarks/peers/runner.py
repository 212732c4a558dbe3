"""Kill one of a peer's workers in the middle of a step, and see what that costs."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.accounting import Cost, cost_of
from benchmarks.peers.envs import pins, python_of
from benchmarks.peers.facts import Facts
from benchmarks.peers.peers import NUM_WORKERS, PEERS, Peer
from benchmarks.peers.processes import Tree
from benchmarks.workload import Workload

WARM_UP_STEPS = 30
START_LIMIT_S = 120.0
EPOCH_LIMIT_S = 120.0
LAST_WORDS_S = 1.0


@dataclass(frozen=True, kw_only=True)
class PeerResult:
    """What a peer's kills cost, one entry a trial; see ``accounting.Cost`` for each figure's meaning."""

    peer: str
    version: str
    settings: dict[str, Any]
    recovery_s: list[float] = field(default_factory=list)
    caught_up_s: list[float] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    samples_lost: list[int] = field(default_factory=list)
    samples_repeated: list[int] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    """The median time between two commits before the kill."""
    not_recovered: int = 0
    """Kills after which the peer made no new step within ``EPOCH_LIMIT_S``; they have no entry in the lists."""
    note: str = ""


class Stuck(Exception):
    """A peer did not go on after a kill. The message ends with what it said last."""


def measure(peer: str, trials: int, *, seed: int = 0, workload: Workload | None = None) -> PeerResult:
    """Train one epoch a trial, and kill -9 one worker at random once it is warm. 20 to 60 s a trial.

    Installs the peer if need be. Raises RuntimeError with the end of the peer's output if it does not start, or when it
    recovers from no kill at all.
    """
    chosen, work = PEERS[peer], workload or Workload()
    python = python_of(peer)
    rng = random.Random(seed)
    outcomes = []
    for _ in range(trials):
        try:
            with tempfile.TemporaryDirectory(prefix="peer-") as folder:
                outcomes.append(_trial(chosen, python, Path(folder), work, rng))
        except Stuck as stuck:
            print(stuck, file=sys.stderr)
    if not outcomes:
        raise RuntimeError(f"{peer} was needed to recover from one of {trials} kills, and did from none; see above")
    costs = [cost for cost, _ in outcomes]
    return PeerResult(
        peer=peer,
        version=pins(peer)[chosen.package],
        settings={
            "workers": NUM_WORKERS,
            "checkpoint_every_steps": work.checkpoint_every_steps,
            "threads_per_worker": 1,
            **chosen.settings,
        },
        recovery_s=[cost.recovery_s for cost in costs],
        caught_up_s=[cost.caught_up_s for cost in costs],
        lost_steps=[cost.lost_steps for cost in costs],
        samples_lost=[cost.samples_lost for cost in costs],
        samples_repeated=[cost.samples_repeated for cost in costs],
        step_s=[step_s for _, step_s in outcomes],
        not_recovered=trials - len(outcomes),
        note=chosen.note,
    )


def _trial(peer: Peer, python: Path, folder: Path, workload: Workload, rng: random.Random) -> tuple[Cost, float]:
    workload.write_data(folder)
    victim = rng.randrange(NUM_WORKERS)
    last_step = WARM_UP_STEPS + rng.randrange(workload.checkpoint_every_steps)
    output = folder / "output.txt"
    with Tree(peer.commands(python, folder, workload), output) as tree:
        facts = Facts(folder)
        for _ in until(lambda: facts.reached(last_step), START_LIMIT_S, tree, output):
            facts.read()
            time.sleep(0.005)
        step_s = facts.step_s()
        time.sleep(rng.random() * step_s)
        killed_t = time.monotonic()
        os.kill(facts.pids[victim], signal.SIGKILL)
        _watch(facts, tree, output)
    cost = cost_of(facts.all, killed_t, workload.num_samples)
    if cost is None:
        raise Stuck(f"{peer.name} made no step beyond {last_step} after the kill:\n{_tail(output)}")
    return cost, step_s


def _watch(facts: Facts, tree: Tree, output: Path) -> None:
    """See the epoch to its end, as an operator who starts again what has died."""
    try:
        for _ in until(facts.finished, EPOCH_LIMIT_S, tree, output):
            tree.revive()
            facts.read()
            time.sleep(0.05)
    except RuntimeError as error:
        raise Stuck(str(error)) from error
    time.sleep(LAST_WORDS_S)
    facts.read()


def until(done: Callable[[], bool], limit_s: float, tree: Tree, output: Path) -> Iterator[None]:
    """Go round until it is done; an error of the peer, or the limit, raises with the end of its output."""
    deadline = time.monotonic() + limit_s
    while not done():
        if tree.failed() or time.monotonic() > deadline:
            raise RuntimeError(f"the peer failed or took more than {limit_s:.0f} s; it said:\n{_tail(output)}")
        yield


def _tail(output: Path) -> str:
    return "\n".join(output.read_text(errors="replace").splitlines()[-40:])
