"""What the events of a run tell."""

from __future__ import annotations

import itertools

import shoal
from shoal.events import Event


def of_kind(run: shoal.Run, kind: str) -> list[Event]:
    return [event for event in run.events if event["kind"] == kind]


def behind(run: shoal.Run) -> set[str]:
    """The workers that halted before a step that others had: who is killed may have reached only some of them."""
    reported = {(e["generation"], e["worker"]): e["step"] for e in of_kind(run, "reported")}
    found = set()
    for before, after in itertools.pairwise(of_kind(run, "generation")):
        stayed = set(before["members"]) & set(after["members"])
        steps = {worker: reported.get((before["generation"], worker)) for worker in stayed}
        found |= {worker for worker, step in steps.items() if step is not None and step < after["base_step"]}
    return found
