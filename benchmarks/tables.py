"""README's figures, from the files in ``benchmarks/results``: ``python -m benchmarks.tables`` writes them anew.

A figure that has no file does not appear, and neither does one of a run with ``--quick``, which is too short to quote.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import REPOSITORY, RESULTS

README = REPOSITORY / "README.md"
BEGIN, END = "<!-- figures: python -m benchmarks.tables -->", "<!-- end of figures -->"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row: the key in the result, what it means, and the bound that was set before it was measured."""

    key: str
    meaning: str
    at_most: float | None = None
    at_least: float | None = None

    def bound(self) -> str:
        """The bound as text; nothing if there is none."""
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        return "" if self.at_least is None else f"at least {self.at_least:g}"

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound."""
        below = self.at_most is None or value <= self.at_most
        return below and (self.at_least is None or value >= self.at_least)


NAMES = {
    "peer_best_s": "peer",
    "goodput_vs_best_peer": "best_peer",
    "wide_deep_goodput_vs_best_peer": "wide_deep_best_peer",
    "peer_goodput_fraction": "best_peer",
}
"""Of a figure of the best of several: the key of which that was."""

TABLES: Mapping[str, tuple[str, Sequence[Figure]]] = {
    "overhead": (
        "What it costs when nothing goes wrong",
        (
            Figure(key="ratio_vs_ddp", meaning="step time, 2 workers, over torch's DDP", at_most=1.03),
            Figure(key="ratio_vs_plain", meaning="step time, 1 worker, over a plain PyTorch loop", at_most=1.03),
            Figure(key="memory_over_ddp", meaning="a worker's peak resident memory, over DDP's", at_most=1.05),
        ),
    ),
    "recovery": (
        "From a fault to the next committed step",
        (
            Figure(key="kill_s", meaning="a worker killed: seconds", at_most=0.5),
            Figure(key="freeze_s", meaning="a worker frozen: seconds", at_most=3),
            Figure(key="coordinator_s", meaning="the coordinator killed: seconds without a commit", at_most=1),
            Figure(key="join_stall_s", meaning="a worker joins: the others' longest gap, seconds", at_most=0.5),
            Figure(key="samples_lost", meaning="samples lost", at_most=0),
            Figure(key="samples_repeated", meaning="samples repeated", at_most=0),
            Figure(key="peer_best_s", meaning="the best of the others, the same kill: seconds"),
            Figure(key="times_shorter_than_peer", meaning="ours is this many times shorter", at_least=3),
            Figure(key="torchft_samples_lost", meaning="samples that torchft lost at that kill"),
            Figure(key="torchrun_s", meaning="torchrun: seconds"),
            Figure(key="torchrun_lost_steps", meaning="steps that torchrun rolled back"),
            Figure(key="ray_train_s", meaning="Ray Train: seconds"),
            Figure(key="ray_train_lost_steps", meaning="steps that Ray Train rolled back"),
        ),
    ),
    "exactly_once": (
        "An epoch among faults",
        (
            Figure(key="faults", meaning="faults, drawn at random", at_least=20),
            Figure(key="samples_lost", meaning="samples lost", at_most=0),
            Figure(key="samples_repeated", meaning="samples repeated", at_most=0),
            Figure(key="max_abs_diff", meaning="farthest parameter from an undisturbed run", at_most=1e-4),
            Figure(key="max_abs_diff_float64", meaning="the same in float64"),
        ),
    ),
    "ingest": (
        "Parquet into a training worker",
        (
            Figure(key="rows_per_s", meaning="rows a second"),
            Figure(key="ratio_vs_dataloader", meaning="over torch's DataLoader on the same files", at_least=3),
            Figure(key="batched_map_style_ratio", meaning="over one that fetches whole batches, rows all in memory"),
            Figure(key="iterable_rowgroup_ratio", meaning="over a row-group IterableDataset"),
            Figure(key="ray_data_ratio", meaning="over Ray Data"),
        ),
    ),
    "link": (
        "A step's communication at 100 Mbit/s, 4 hosts, 1.86 million parameters",
        (
            Figure(key="fp32_over_limit", meaning="fp32, over the least that the rate allows", at_most=1.10),
            Figure(key="int8_over_limit", meaning="int8, over the least that the rate allows", at_most=1.15),
            Figure(key="int8_vs_ddp", meaning="int8: times faster a step than DDP", at_least=3.3),
            Figure(key="onebit_vs_ddp", meaning="one bit: times faster a step than DDP", at_least=10),
            Figure(key="int8_vs_best_hook", meaning="int8: than the best of torch's hooks that run", at_least=1.6),
            Figure(key="onebit_vs_best_hook", meaning="one bit: than that hook"),
            Figure(key="int8_vs_ddp_1gbit", meaning="int8: times faster than DDP at 1 Gbit/s"),
        ),
    ),
    "time_to_accuracy": (
        "Fashion-MNIST to a test accuracy of 0.88 at 100 Mbit/s, 4 hosts",
        (
            Figure(key="speedup_vs_ddp", meaning="our best setting: times sooner than DDP", at_least=20),
            Figure(key="speedup_vs_best_hook", meaning="than DDP with torch's best hook that runs", at_least=5),
            Figure(key="accuracy_gap_pp", meaning="accuracy given up at equal samples, percent points", at_most=0.3),
        ),
    ),
    "codecs": (
        "Codecs, on one thread",
        (Figure(key="int8_gb_per_s", meaning="int8: GB/s of float32, encoding plus decoding", at_least=1.0),),
    ),
    "straggler": (
        "One of 4 hosts at a third of its speed",
        (
            Figure(key="speedup_vs_static", meaning="times faster than with lanes that stay", at_least=1.5),
            Figure(key="recovered_over_undisturbed", meaning="all equal again, over undisturbed", at_least=0.95),
        ),
    ),
    "goodput": (
        "A worker killed every 5 seconds",
        (
            Figure(key="goodput_allreduce", meaning="AllReduce: samples a second over undisturbed", at_least=0.85),
            Figure(key="goodput_diloco", meaning="DiLoCo: samples a second over undisturbed", at_least=0.85),
            Figure(key="samples_lost", meaning="samples lost", at_most=0),
            Figure(key="samples_repeated", meaning="samples repeated", at_most=0),
        ),
    ),
    "table": (
        "A table of rows of 16 on one thread",
        (
            Figure(key="adagrad_pull_ours_rows_per_s_100000", meaning="rows pulled a second, 100,000 at once"),
            Figure(key="adagrad_push_ours_rows_per_s_100000", meaning="rows pushed a second, with Adagrad"),
            Figure(key="adagrad_push_torch_rows_per_s_100000", meaning="torch's sparse Adagrad: rows a second"),
            Figure(key="bytes_per_row", meaning="bytes a row, of which 128 are weights and slots", at_most=168),
            Figure(
                key="longest_pause_ms", meaning="the longest push while it grows to 10 million rows: ms", at_most=50
            ),
            Figure(key="delta_vs_full", meaning="a delta of 1 %: times smaller and faster than all", at_least=20),
        ),
    ),
    "sparse": (
        "One shard over loopback, with a key, each push in its log",
        (
            Figure(key="pull_rows_per_s", meaning="rows pulled a second, 100,000 at once", at_least=4e6),
            Figure(key="push_rows_per_s", meaning="rows pushed a second, with Adagrad", at_least=2e6),
            Figure(key="pull_500_ms", meaning="500 rows pulled: ms", at_most=0.3),
            Figure(key="encrypted_pull_rows_per_s_100000", meaning="encrypted: rows pulled a second"),
            Figure(key="encrypted_push_rows_per_s_100000", meaning="encrypted: rows pushed a second"),
            Figure(key="encrypted_pull_500_ms", meaning="encrypted, as between two machines: 500 rows pulled, ms"),
            Figure(
                key="vs_tf_ps",
                at_least=5,
                meaning="TensorFlow's server: times its time for a pull and a push; neither encrypts or has a log",
            ),
            Figure(key="vs_tf_ps_500", meaning="of 500 rows"),
            Figure(key="vs_tf_ps_100000", meaning="of 100,000 rows"),
            Figure(key="vs_tf_ps_fused", meaning="times its time with many steps in one function"),
            Figure(key="vs_tf_ps_local", meaning="times its time, ours with a key and a log"),
            Figure(key="vs_tf_ps_encrypted", meaning="times its time, ours with a log and encrypted"),
        ),
    ),
    "sparse_training": (
        "A million rows and a small dense net at 1 Gbit/s, 4 workers, 2 shards",
        (
            Figure(key="speedup_vs_dense_allreduce", meaning="times faster a step than DDP, dense", at_least=10),
            Figure(key="speedup_vs_sparse_allreduce", meaning="than DDP with sparse gradients"),
            Figure(key="samples_per_s", meaning="samples a second"),
            Figure(key="auc_difference", meaning="AUC, farthest from the plain loop's", at_most=0.002),
        ),
    ),
    "shard_faults": (
        "Shards and workers killed at random, with logs and with replicas",
        (
            Figure(key="kills", meaning="kills", at_least=20),
            Figure(key="updates_lost", meaning="updates lost", at_most=0),
            Figure(key="updates_repeated", meaning="updates repeated", at_most=0),
            Figure(key="bits_differ", meaning="in step: tables that differ in a bit", at_most=0),
            Figure(key="recovery_s", meaning="the longest recovery: seconds", at_most=2),
        ),
    ),
    "moving": (
        "A bucket moves, a shard comes, a shard goes, under load",
        (
            Figure(key="failed_requests", meaning="requests that failed", at_most=0),
            Figure(key="updates_lost", meaning="updates lost", at_most=0),
            Figure(key="updates_repeated", meaning="updates repeated", at_most=0),
            Figure(key="pause_ms", meaning="the longest that nobody served a bucket: ms", at_most=50),
            Figure(key="longest_request_ms", meaning="the longest that a worker waited: ms"),
        ),
    ),
    "staleness": (
        "Four workers, each slowed 4 times in 15 % of the time",
        (
            Figure(key="bounded_vs_sync", meaning="the best bound: times sooner than in step", at_least=1.4),
            Figure(key="violations", meaning="reads staler than promised", at_most=0),
        ),
    ),
    "recommend": (
        "Recipes with tables",
        (
            Figure(key="rmse", meaning="MovieLens-100k, 5 folds, 4 workers, asynchronous: RMSE", at_most=0.94),
            Figure(key="rmse_plain", meaning="the plain loop in one process: RMSE"),
            Figure(key="fraud_auc", meaning="card payments in time order, FTRL: AUC", at_least=0.97),
            Figure(key="fraud_average_precision", meaning="their average precision (gradient boosting: 0.79)"),
        ),
    ),
    "serve": (
        "Predictions over HTTP, one sample a request, as JSON",
        (
            Figure(key="goodput_rps", meaning="Fashion-MNIST's network: requests a second at a p99 of 50 ms"),
            Figure(key="goodput_vs_best_peer", meaning="over the best of six other servers", at_least=1.2),
            Figure(key="p50_ms", meaning="p50 of a single client: ms"),
            Figure(key="overhead_ms", meaning="of which the bare model does not take: ms", at_most=1.5),
            Figure(key="wide_deep_goodput_rps", meaning="wide and deep on tables: requests a second"),
            Figure(key="wide_deep_goodput_vs_best_peer", meaning="over the best of six other servers", at_least=1.2),
        ),
    ),
    "overload": (
        "Twice as many requests as can be answered",
        (
            Figure(key="goodput_fraction", meaning="answered within 250 ms, over what can be answered", at_least=0.9),
            Figure(key="peer_goodput_fraction", meaning="the best of six other servers, offered as much"),
            Figure(key="refused_p99_ms", meaning="refusals, p99: ms", at_most=20),
            Figure(key="memory_growth_mb", meaning="more memory after it: MB"),
            Figure(key="memory_growth_again_mb", meaning="and after as much again: MB"),
        ),
    ),
    "rollout": (
        "Ten new versions under load, one worse and one deadly; then a process killed every 2 seconds",
        (
            Figure(key="requests", meaning="requests"),
            Figure(key="failed_requests", meaning="that failed", at_most=0),
            Figure(key="swaps", meaning="versions that came to answer", at_least=8),
            Figure(key="rollback_s", meaning="from the demand to roll back to the first answer: seconds", at_most=1),
            Figure(key="killed", meaning="processes killed"),
        ),
    ),
    "freshness": (
        "A live run with tables, followed by a server",
        (
            Figure(key="fresh_p50_s", meaning="from a version's commit to its first answer, p50: seconds", at_most=1),
            Figure(key="fresh_p99_s", meaning="p99: seconds"),
            Figure(key="by_delta", meaning="of the versions, by what is new in their tables"),
            Figure(key="failed_requests", meaning="requests that failed", at_most=0),
        ),
    ),
}


def table(name: str, result: Mapping[str, Any]) -> str:
    """One benchmark's table, in Markdown, with where and when it was measured."""
    title, figures = TABLES[name]
    rows = [row(figure, result["figures"]) for figure in figures if figure.key in result["figures"]]
    machine = result["machine"]
    where = (
        f"`python -m benchmarks.{name}` on {machine['cores']} cores of {machine['processor']}, "
        f"torch {machine['torch']}, {result['measured_at'][:10]}; [all of it](benchmarks/results/{name}.json)."
    )
    return "\n".join([f"**{title}.** {where}", "", "| | measured | wanted |", "|---|---|---|", *rows, ""])


def row(figure: Figure, figures: Mapping[str, Any]) -> str:
    """A figure beside its bound; one that falls short says so."""
    value = figures[figure.key]
    named = figures.get(NAMES.get(figure.key, ""))
    peer = f" ({named})" if named else ""
    if value is None:
        return f"| {figure.meaning} | not measured | {figure.bound()} |"
    verdict = "" if figure.holds(value) else ": **missed**"
    return f"| {figure.meaning}{peer} | {value:.4g} | {figure.bound()}{verdict} |"


def render(readme: str, results: Path = RESULTS) -> str:
    """``readme`` with the figures between its two marks replaced by what the files say."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README.name} must hold the lines {BEGIN} and {END}")
    paths = {name: results / f"{name}.json" for name in TABLES}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    tables = [table(name, result) for name, result in found.items() if not result["config"].get("quick")]
    return "\n".join([before + begin, "", *tables, end + after]) if tables else before + begin + "\n" + end + after


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
    sys.exit(0)
