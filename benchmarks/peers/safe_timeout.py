"""How short torchft's heartbeat time-out can be: ``python -m benchmarks.peers.safe_timeout MILLISECONDS …``.

Workers are paused (SIGSTOP) for a quarter of a second, 40 times in an epoch, and none is dead: about the silence after
one packet that a network loses, which TCP sends again after 200 ms at the least. A time-out is safe if no worker is
dropped. Prints one JSON line a time-out; about a minute each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.accounting import samples_used
from benchmarks.peers.envs import python_of
from benchmarks.peers.facts import Facts
from benchmarks.peers.peers import NUM_WORKERS, torchft_commands
from benchmarks.peers.processes import Tree
from benchmarks.peers.runner import EPOCH_LIMIT_S, LAST_WORDS_S, START_LIMIT_S, until
from benchmarks.workload import Workload

PAUSE_S = 0.25
NUM_PAUSES = 40
WARM_UP_STEPS = 10


def pause_workers(heartbeat_timeout_ms: int, seed: int = 0) -> dict[str, Any]:
    """One epoch with pauses: how often the workers that make a step changed, and how many samples that lost."""
    workload, rng = Workload(), random.Random(seed)
    python = python_of("torchft")
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        folder = Path(name)
        output = folder / "output.txt"
        workload.write_data(folder)
        commands = torchft_commands(python, folder, workload, heartbeat_timeout_ms=heartbeat_timeout_ms)
        with Tree(commands, output) as tree:
            facts = Facts(folder)
            for _ in until(lambda: facts.reached(WARM_UP_STEPS), START_LIMIT_S, tree, output):
                facts.read()
                time.sleep(0.05)
            pauses = _pause(facts, rng)
            for _ in until(facts.finished, EPOCH_LIMIT_S, tree, output):
                facts.read()
                time.sleep(0.05)
            time.sleep(LAST_WORDS_S)
            facts.read()
    groups = {fact["group"] for fact in facts.all if fact["event"] == "commit"}
    return {
        "heartbeat_timeout_ms": heartbeat_timeout_ms,
        "pauses": pauses,
        "regroups": len(groups) - 1,
        "samples_lost": workload.num_samples - len(samples_used(facts.all)),
    }


def _pause(facts: Facts, rng: random.Random) -> int:
    """Pause one worker after another at random moments until the epoch ends; the number of pauses made."""
    for number in range(NUM_PAUSES):
        facts.read()
        if facts.finished():
            return number
        time.sleep(rng.uniform(0.1, 0.3))
        pid = facts.pids[rng.randrange(NUM_WORKERS)]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(PAUSE_S)
            os.kill(pid, signal.SIGCONT)
    return NUM_PAUSES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.safe_timeout", description=__doc__)
    parser.add_argument("milliseconds", type=int, nargs="+")
    for heartbeat_timeout_ms in parser.parse_args().milliseconds:
        print(json.dumps(pause_workers(heartbeat_timeout_ms)), flush=True)


if __name__ == "__main__":
    main()
