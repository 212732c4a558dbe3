"""``python -m benchmarks.peers NAME [--trials 2] [--seed 0]``: one JSON line."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from benchmarks.peers.peers import PEERS
from benchmarks.peers.runner import measure


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Kill one worker of a peer.")
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    print(json.dumps(asdict(measure(chosen.peer, chosen.trials, seed=chosen.seed))))


if __name__ == "__main__":
    main()
