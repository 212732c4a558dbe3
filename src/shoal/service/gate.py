"""What a candidate must show before it sees a request: metrics, no skew, and that it can bear what came lately."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import ShoalError
from shoal.rollout import Check, Policy
from shoal.service.release import Release
from shoal.serving.answering import Served
from shoal.serving.batching import Overloaded
from shoal.serving.codec import decode_request, decode_response, encode_request, encode_response
from shoal.serving.datatypes import Arrays, as_arrays, as_tensors
from shoal.serving.packaged import differences_of

_PATIENCE_S = 60.0


@dataclass
class _Seen:
    """What a gate knows so far, and what it is looking at."""

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    at: str = "signature"


async def looked_at(
    candidate: Release, live: Release | None, policy: Policy, recent: Sequence[Arrays]
) -> tuple[list[Check], dict[str, Any]]:
    """All checks, and the candidate's metrics. ``live``: what answers now, with its metrics. One check fails if they
    take longer than the policy lets them: then the process that measures is ended."""
    seen = _Seen()
    try:
        async with asyncio.timeout(policy.gate_s) as limit:
            await _look(seen, candidate, live, policy, recent)
    except TimeoutError:
        if not limit.expired():
            raise
        told = (
            f"after {policy.gate_s:g} s the gate was still at {seen.at}: give it longer (--gate-timeout), or less to do"
        )
        seen.checks.append(Check("time", False, told))
    return seen.checks, seen.figures


async def _look(
    seen: _Seen, candidate: Release, live: Release | None, policy: Policy, recent: Sequence[Arrays]
) -> None:
    seen.checks.append(fits := _fits(candidate.served, live))
    if policy.gates:
        seen.at = "metrics"
        seen.figures, failed = await _measured(candidate)
        before = live.standard if live is not None else None
        seen.checks += failed or [threshold.check(seen.figures, before) for threshold in policy.gates]
    if fits.is_met:
        seen.at = "skew"
        seen.checks.append(await _skew(candidate))
        seen.at = "replay"
        seen.checks.append(await _replayed(candidate, recent))


def _fits(served: Served, live: Release | None) -> Check:
    """Whoever asks the live version can ask this one."""
    if live is None:
        return Check("signature", True, "it is the first")
    known = live.served
    is_met = (served.name, served.inputs, served.outputs) == (known.name, known.inputs, known.outputs)
    return Check("signature", is_met, "as the live version's" if is_met else f"{served}, and the live one is {known}")


async def _measured(candidate: Release) -> tuple[dict[str, Any], list[Check]]:
    try:
        return await candidate.measure(), []
    except ShoalError as error:
        return {}, [Check("metrics", False, error.message)]


async def _skew(candidate: Release) -> Check:
    """Training samples, as requests, through all that a request goes through, give what the model gave in training's
    own hands."""
    probe = candidate.held.probe
    if not probe.inputs:
        return Check("skew", True, "no training samples are in the form of requests")
    served = candidate.served
    try:
        body = await asyncio.to_thread(encode_request, as_arrays(probe.inputs), {})
        question = await asyncio.to_thread(decode_request, body, None, served.inputs, served.outputs)
        answer = await candidate.ask(question.inputs, _PATIENCE_S)
        encoded, _ = encode_response(question, served.name, served.version, answer.outputs)
        decoded = as_tensors(decode_response(encoded))
    except Exception as error:  # noqa: BLE001 - it is what was to be found out
        return Check("skew", False, f"training samples cannot be asked for: {error}")
    wrong = {name: far for name, far in differences_of(decoded, probe.outputs).items() if far}
    num = len(next(iter(probe.inputs.values())))
    return Check("skew", not wrong, f"of {num} training samples {wrong} differ at most" if wrong else f"{num} samples")


async def _replayed(candidate: Release, recent: Sequence[Arrays]) -> Check:
    num_failed, reason = 0, ""
    for inputs in recent:
        try:
            await candidate.ask(inputs, _PATIENCE_S)
        except Overloaded:  # of what was asked before; nobody else asks it
            continue
        except Exception as error:  # noqa: BLE001 - counted
            num_failed, reason = num_failed + 1, f": {error}"
    return Check("replay", not num_failed, f"{num_failed} of {len(recent)} requests failed{reason}")
