"""What is left of the speed under a kill every 5 seconds, a cut link, and links that are always full.

python -m benchmarks.goodput [--quick [--strategy NAME]] [--seed N] [--cost sample|step]

Four hosts in a lab, one worker each. Each sample takes its time, asleep: a worker less is a quarter of the speed less,
as on real hosts, until its replacement has loaded torch, on cores that all share. With ``--cost step`` a step takes the
same however many workers are left: what remains is the cost of healing. Goodput is committed samples a second under
kills over the rate before them, in the same run. ``capacity``: the part of the workers that were there to compute.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.lab_runs import WORKERS, Accounts, LabRun, Phase, pids_by_host
from benchmarks.machine import finish
from shoal.events import Event
from shoal.lab import Lab, LabSpec

KILL_EVERY_S, CUT_S, SLOW_LINK = 5.0, 3.0, "10mbit"
BATCH, STEP_S, WIDTH, WIDE = 64, 0.1, 512, 1400
COSTS = {"sample": {"LAB_JOB_SAMPLE_S": STEP_S * WORKERS / BATCH}, "step": {"LAB_JOB_STEP_S": STEP_S}}
STRATEGIES = ("allreduce", "allreduce_int8", "local_sgd", "diloco")
SETTINGS = ("patience.collective_s=2",)


@dataclass
class Story:
    """What was done to a run, and what came of it."""

    lab: Lab
    run: LabRun
    calm: Phase | None = None
    storm: Phase | None = None
    cut: Phase | None = None
    slow: Phase | None = None
    kills: list[float] = field(default_factory=list)
    accounts: Accounts | None = None
    sent_bytes_per_s: float = 0.0

    def be_calm(self, duration_s: float) -> None:
        """Let it be."""
        self.run.until_all_commit()
        self.calm = self.run.phase(duration_s)

    def kill_every_5_s(self, num_kills: int, chance: random.Random) -> None:
        """SIGKILL to the worker of a host drawn at random, at once and every 5 s, and 5 s after the last."""
        self.run.until_all_commit()
        begun_s = time.time()
        for number in range(num_kills):
            alive = pids_by_host(self.run.events)
            victim = chance.choice(sorted(alive))
            with suppress(ProcessLookupError):
                os.kill(alive[victim], signal.SIGKILL)
            self.kills.append(time.time())
            self.run.phase(begun_s + (number + 1) * KILL_EVERY_S - time.time())
        self.storm = Phase(begun_s, begun_s + num_kills * KILL_EVERY_S)

    def cut_a_link(self, host: int) -> None:
        """For 3 s; it is over once all commit again."""
        self.run.until_all_commit()
        begun_s = time.time()
        self.lab.cut(host)
        self.run.phase(CUT_S)
        self.lab.heal(host)
        self.run.until_all_commit()
        self.cut = Phase(begun_s, time.time())

    def fill_links(self, duration_s: float) -> None:
        """10 Mbit/s on all hosts."""
        self.run.until_all_commit()
        for host in self.lab.hosts:
            self.lab.slow(host, SLOW_LINK)
        sent_before = [self.lab.bytes(host)[0] for host in self.lab.hosts]
        self.slow = self.run.phase(duration_s)
        self.sent_bytes_per_s = sum(
            self.lab.bytes(host)[0] - sent for host, sent in zip(self.lab.hosts, sent_before, strict=True)
        ) / (len(sent_before) * duration_s)
        for host in self.lab.hosts:
            self.lab.slow(host, None)

    def end(self) -> Story:
        """Stop, count, and tell."""
        self.run.stop()
        self.accounts = self.run.account()
        tell(self)
        return self

    def figures(self) -> dict[str, Any]:
        """Of what was done to it, under the strategy's name."""
        name, events, commits = self.run.name, self.run.events, self.run.commits
        found: dict[str, Any] = {}
        if self.calm and self.storm:
            rates = [BATCH * commits.steps_per_s(p.from_s, p.until_s) for p in (self.calm, self.storm)]
            found[f"goodput_{name}"] = round(rates[1] / rates[0], 3)
            found[f"undisturbed_samples_per_s_{name}"] = round(rates[0], 1)
            found[f"capacity_{name}"] = round(capacity(events, self.storm), 3)
            found[f"longest_gap_s_{name}"] = round(commits.longest_gap(self.storm.from_s, self.storm.until_s), 2)
        if self.cut:
            found["cut_gap_s"] = round(commits.longest_gap(self.cut.from_s, self.cut.until_s), 2)
            found["cut_given_up"] = self.cut.count(events, "lost", "dismissed")
        if self.slow:
            found["slow_link_given_up"] = self.slow.count(events, "lost", "dismissed", "stalled")
            found["slow_link_commits"] = self.slow.count(events, "progress")
            found["slow_link_in_use"] = round(self.sent_bytes_per_s * 8 / 10e6, 3)
        return found


def capacity(events: Sequence[Event], phase: Phase) -> float:
    """The part of all workers that had lanes and were alive, over a phase: more than that cannot be expected."""
    present, changes = 0, [(phase.from_s, -1)]
    alive: dict[str, int] = {}
    for event in events:
        if event["kind"] in ("generation", "deal"):
            alive = dict(event["lanes"])
        elif event["kind"] in ("lost", "dismissed"):
            alive.pop(event["worker"], None)
        else:
            continue
        present = sum(count > 0 for count in alive.values())
        if event["at_s"] <= phase.from_s:
            changes = [(phase.from_s, present)]
        elif event["at_s"] < phase.until_s:
            changes.append((event["at_s"], present))
    changes.append((phase.until_s, present))
    total_s = sum(count * (after_s - at_s) for (at_s, count), (after_s, _) in pairwise(changes))
    return total_s / (WORKERS * (phase.until_s - phase.from_s))


@dataclass(frozen=True)
class Stage:
    """Where runs take place. ``cost``: of ``COSTS``."""

    folder: Path
    seed: int
    cost: str

    def begin(self, name: str, lab: Lab, width: int = WIDTH) -> LabRun:
        """A run with the strategy of that name, or else with all-reduce."""
        print(f"{name}: begins", flush=True)
        strategy = name if name in STRATEGIES else "allreduce"
        env = {"LAB_JOB_STRATEGY": strategy, "LAB_JOB_BATCH": BATCH, "LAB_JOB_WIDTH": width, **COSTS[self.cost]}
        return LabRun(lab, self.folder, name, SETTINGS, **env)

    def all_of_it(self) -> list[Story]:
        """One strategy after the other, and then full links."""
        return [self._one(name) for name in STRATEGIES] + [self._full_links()]

    def _one(self, name: str) -> Story:
        with Lab(LabSpec(hosts=WORKERS, warm=True)) as lab, self.begin(name, lab) as run:
            story = Story(lab, run)
            story.be_calm(15)
            story.kill_every_5_s(18, random.Random(self.seed))
            if name == "allreduce":
                story.cut_a_link(2)
            return story.end()

    def _full_links(self) -> Story:
        with Lab(LabSpec(hosts=WORKERS, warm=True)) as lab, self.begin("slow_link", lab, WIDE) as run:
            story = Story(lab, run)
            story.fill_links(30)
            return story.end()

    def quickly(self, name: str) -> list[Story]:
        """One strategy meets all of it, a little at a time."""
        with Lab(LabSpec(hosts=WORKERS, warm=True)) as lab, self.begin(name, lab) as run:
            story = Story(lab, run)
            story.be_calm(4)
            story.kill_every_5_s(2, random.Random(self.seed))
            story.cut_a_link(2)
            story.fill_links(5)
            return [story.end()]


def tell(story: Story) -> None:
    """A line a figure."""
    for name, value in story.figures().items():
        print(f"  {name:36} {value}")
    print(f"  {story.run.name}: {story.accounts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--strategy", choices=STRATEGIES, default="allreduce", help="the one of a quick run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", choices=COSTS, default="sample")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), options.seed, options.cost)
        stories = stage.quickly(options.strategy) if options.quick else stage.all_of_it()
    figures: dict[str, Any] = {}
    for story in stories:
        figures |= story.figures()
    accounts = [story.accounts for story in stories if story.accounts]
    figures["samples_lost"] = sum(a.lost for a in accounts)
    figures["samples_repeated"] = sum(a.repeated for a in accounts)
    figures["kills"] = sum(len(story.kills) for story in stories)
    config = {
        "quick": options.quick, "workers": WORKERS, "batch": BATCH, "cost": options.cost, "step_s": STEP_S,
        "width": WIDTH, "width_on_slow_links": WIDTH if options.quick else WIDE,
        "kill_every_s": KILL_EVERY_S, "settings": SETTINGS,
    }  # fmt: skip
    finish("goodput", figures, config, seed=options.seed)


if __name__ == "__main__":
    main()
