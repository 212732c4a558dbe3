"""One of four hosts at a third of its speed: what moving lanes to the others makes of it.

python -m benchmarks.straggler [--quick]

Four hosts in a lab, each with 0.4 of a core, so that two cores hold them all with a reserve and no host's speed depends
on another's. The kernel takes two thirds of one host's share away, and gives it back. The same without the balance
(``balance.enabled=false``), in turns: while one computes, the other is stopped (SIGSTOP). With ``--quick`` there is no
other run: until lanes first move it would be no different. In the full run also: one link of 20 Mbit/s among 100
Mbit/s, for which moving lanes is no cure in an all-reduce, and should do no harm.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab_runs import WORKERS, LabRun, Phase, lanes_of
from benchmarks.machine import finish, median_and_spread
from shoal.events import Event
from shoal.lab import Lab, LabSpec

CORES, SLOW_CORES = 0.4, 0.4 / 3
BATCH, ROWS, WIDTH = 64, 256, 256
LINK_ROWS, LINK_WIDTH = 64, 512
LINK, SLOW_LINK = "100mbit", "20mbit"
SETTLED = 0.95
STATIC_SETTLE_S = 2
DRAIN_S = 0.5
SLOW_HOST = 1


PATIENT = tuple(f"patience.{name}=1000000" for name in ("silent_s", "disconnected_s", "collective_s", "stuck_s"))


@dataclass(frozen=True)
class Durations:
    """How long each phase lasts, and its end, in which its rate is taken, in seconds; how often there are both runs."""

    undisturbed_s: float
    disturbed_s: float
    equal_again_s: float
    end_s: float
    turns: int


FULL = Durations(undisturbed_s=14, disturbed_s=26, equal_again_s=26, end_s=14, turns=2)
LINKS = Durations(undisturbed_s=10, disturbed_s=22, equal_again_s=12, end_s=10, turns=1)
QUICK = Durations(undisturbed_s=4, disturbed_s=8, equal_again_s=8, end_s=4, turns=1)


@dataclass(frozen=True)
class Turn:
    """Samples a second with the balance in each phase, and without it while disturbed; the seconds until a new rate was
    reached; how often lanes moved, and how many each host had at the end of the disturbance and at that of the run."""

    undisturbed_per_s: float
    disturbed_per_s: float
    equal_again_per_s: float
    static_per_s: float
    settle_s: float | None
    recover_s: float | None
    deals: int
    lanes: list[int]
    lanes_again: list[int]
    lost: int | None = None
    repeated: int | None = None


@dataclass(frozen=True)
class Trouble:
    """What befalls a host, and what a step costs; ``link``: of all hosts before."""

    link: str
    rows: int
    width: int
    slow_cores: float | None = None
    slow_link: str | None = None

    def begin(self, lab: Lab) -> None:
        """Inflict it."""
        if self.slow_cores is not None:
            lab.cpu(SLOW_HOST, self.slow_cores)
        if self.slow_link is not None:
            # While queues are empty: tbf never sends what waits in it and is larger than a burst that it is told later.
            with frozen(lab):
                time.sleep(DRAIN_S)
                lab.slow(SLOW_HOST, self.slow_link)

    def end(self, lab: Lab) -> None:
        """All hosts are equal again."""
        lab.cpu(SLOW_HOST, CORES)
        if self.slow_link is not None:
            lab.slow(SLOW_HOST, None)


@contextmanager
def frozen(lab: Lab) -> Iterator[None]:
    """Within this nothing runs on the hosts."""
    for host in lab.hosts:
        lab.freeze(host)
    try:
        yield
    finally:
        for host in lab.hosts:
            lab.thaw(host)


SLOW_PROCESSOR = Trouble("none", ROWS, WIDTH, slow_cores=SLOW_CORES)
ONE_SLOW_LINK = Trouble(LINK, LINK_ROWS, LINK_WIDTH, slow_link=SLOW_LINK)


@dataclass
class Runner:
    """A run in a lab of its own."""

    lab: Lab
    run: LabRun

    def share_out(self) -> None:
        """Once all commit: from now on each host has its share of the processor."""
        self.run.until_all_commit()
        for host in self.lab.hosts:
            self.lab.cpu(host, CORES)

    def rate(self, phase: Phase, end_s: float) -> float:
        """Samples a second at the end of a phase."""
        window = phase.last(end_s)
        return BATCH * self.run.commits.steps_per_s(window.from_s, window.until_s)

    def settled_after(self, phase: Phase, end_s: float) -> float | None:
        """Seconds until the rate at the end of a phase was nearly reached."""
        least_per_s = SETTLED * self.rate(phase, end_s) / BATCH
        return self.run.commits.settled_after(phase.from_s, phase.until_s, least_per_s)


def take_turn(name: str, trouble: Trouble, folder: Path, last: Durations) -> Turn:
    """Both runs begin, and one goes on after the other."""
    env = {"LAB_JOB_STRATEGY": "allreduce", "LAB_JOB_BATCH": BATCH}
    env |= {"LAB_JOB_ROWS": trouble.rows, "LAB_JOB_WIDTH": trouble.width}
    with ExitStack() as stack:
        runners = []
        for balance in ("true",) if last is QUICK else ("true", "false"):
            lab = stack.enter_context(Lab(LabSpec(hosts=WORKERS, link=trouble.link, cpu="1", warm=True)))
            run = LabRun(lab, folder, f"{name}-{balance}", (f"balance.enabled={balance}", *PATIENT), **env)
            runners.append(Runner(lab, stack.enter_context(run)))
        if last is QUICK:
            runners[0].share_out()
            return Turn(**go_through(runners[0], trouble, last))
        balanced, static = runners
        static.share_out()
        with frozen(static.lab):
            balanced.share_out()
            found = go_through(balanced, trouble, last)
            balanced.run.stop()
        trouble.begin(static.lab)
        found["static_per_s"] = static.rate(static.run.phase(STATIC_SETTLE_S + last.end_s), last.end_s)
        static.run.stop()
        accounts = [runner.run.account() for runner in runners]
        found |= {"lost": sum(a.lost for a in accounts), "repeated": sum(a.repeated for a in accounts)}
    return Turn(**found)


def go_through(balanced: Runner, trouble: Trouble, last: Durations) -> dict[str, Any]:
    """Undisturbed, disturbed, and equal again."""
    run = balanced.run
    run.phase(1)
    before = run.phase(last.undisturbed_s)
    trouble.begin(balanced.lab)
    during = run.phase(last.disturbed_s)
    lanes = lanes_of(run.events)
    trouble.end(balanced.lab)
    after = run.phase(last.equal_again_s)
    run.until_all_commit(1)
    return {
        "undisturbed_per_s": balanced.rate(before, last.undisturbed_s),
        "disturbed_per_s": balanced.rate(during, last.end_s),
        "static_per_s": BATCH * run.commits.steps_per_s(during.from_s, first_deal_s(run.events, during)),
        "equal_again_per_s": balanced.rate(after, last.end_s),
        "settle_s": balanced.settled_after(during, last.end_s),
        "recover_s": balanced.settled_after(after, last.end_s),
        "deals": sum(e["kind"] == "deal" and e["reason"] == "balance" for e in run.events),
        "lanes": list(lanes.values()),
        "lanes_again": list(lanes_of(run.events).values()),
    }


def first_deal_s(events: Sequence[Event], phase: Phase) -> float:
    """When lanes first moved in a phase; its end if they did not."""
    moved = (e["at_s"] for e in events if e["kind"] == "deal" and phase.from_s < e["at_s"] < phase.until_s)
    return next(moved, phase.until_s)


def take_turns(name: str, trouble: Trouble, folder: Path, last: Durations) -> list[Turn]:
    """As many as there are to be."""
    turns = []
    for number in range(last.turns):
        turns.append(take_turn(f"{name}-{number}", trouble, folder, last))
        told = {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(turns[-1]).items()}
        print(f"{name} {number + 1}: {told}", flush=True)
    return turns


def figures_of(turns: Sequence[Turn]) -> dict[str, float | None]:
    """Medians over the turns; None for a rate that was not reached in each of them."""
    ratios = {
        "speedup_vs_static": [t.disturbed_per_s / t.static_per_s for t in turns],
        "recovered_over_undisturbed": [t.equal_again_per_s / t.undisturbed_per_s for t in turns],
        "slowed_over_undisturbed": [t.disturbed_per_s / t.undisturbed_per_s for t in turns],
        "static_over_undisturbed": [t.static_per_s / t.undisturbed_per_s for t in turns],
    }
    found: dict[str, float | None] = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    for name in ("settle_s", "recover_s"):
        known = [value for t in turns if (value := getattr(t, name)) is not None]
        found[name] = round(statistics.median(known), 2) if len(known) == len(turns) else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    last = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        turns = take_turns("processor", SLOW_PROCESSOR, Path(name), last)
        links = [] if options.quick else take_turns("link", ONE_SLOW_LINK, Path(name), LINKS)
    figures: dict[str, Any] = figures_of(turns)
    if links:
        figures |= {f"slow_link_{key}": value for key, value in figures_of(links).items()}
        figures["samples_lost"] = sum(turn.lost or 0 for turn in (*turns, *links))
        figures["samples_repeated"] = sum(turn.repeated or 0 for turn in (*turns, *links))
    config = {
        "quick": options.quick, "workers": WORKERS, "batch": BATCH, "cores": CORES, "slow_cores": round(SLOW_CORES, 4),
        "durations": asdict(last), "processor": asdict(SLOW_PROCESSOR), "link": asdict(ONE_SLOW_LINK),
        "spread": median_and_spread([t.disturbed_per_s / t.static_per_s for t in turns]),
        "turns": [asdict(turn) for turn in turns], "links": [asdict(turn) for turn in links],
    }  # fmt: skip
    finish("straggler", figures, config)


if __name__ == "__main__":
    main()
