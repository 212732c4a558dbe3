"""What a candidate must show before it sees a request: metrics, no skew, and that it can bear what came lately."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from shoal.errors import ShoalError
from shoal.rollout import Check, Threshold
from shoal.service.release import Release
from shoal.serving.answering import Served
from shoal.serving.batching import Expired, Overloaded
from shoal.serving.codec import decode_request, decode_response, encode_request, encode_response
from shoal.serving.packaged import differences_of

_PATIENCE_S = 60.0


async def looked_at(
    candidate: Release, live: Release | None, thresholds: Sequence[Threshold], recent: Sequence[Mapping[str, Tensor]]
) -> tuple[list[Check], dict[str, Any]]:
    """All checks, and the candidate's metrics. ``live``: what answers now, with its metrics."""
    checks = [_fits(candidate.served, live)]
    figures: dict[str, Any] = {}
    if thresholds:
        figures, failed = await _measured(candidate)
        before = live.figures if live is not None else None
        checks += failed or [threshold.check(figures, before) for threshold in thresholds]
    if checks[0].is_met:
        checks.append(await _skew(candidate))
        checks.append(await _replayed(candidate, recent))
    return checks, figures


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
        body = await asyncio.to_thread(encode_request, probe.inputs, {})
        question = await asyncio.to_thread(decode_request, body, None, served.inputs, served.outputs)
        outputs = await candidate.ask(question.inputs, _PATIENCE_S)
        answer, _ = encode_response(question, served.name, served.version, outputs)
        decoded = decode_response(answer)
    except Exception as error:  # noqa: BLE001 - it is what was to be found out
        return Check("skew", False, f"training samples cannot be asked for: {error}")
    wrong = {name: far for name, far in differences_of(decoded, probe.outputs).items() if far}
    num = len(next(iter(probe.inputs.values())))
    return Check("skew", not wrong, f"of {num} training samples {wrong} differ at most" if wrong else f"{num} samples")


async def _replayed(candidate: Release, recent: Sequence[Mapping[str, Tensor]]) -> Check:
    num_failed, reason = 0, ""
    for inputs in recent:
        try:
            await candidate.ask(inputs, _PATIENCE_S)
        except (Overloaded, Expired):
            continue
        except Exception as error:  # noqa: BLE001 - counted
            num_failed, reason = num_failed + 1, f": {error}"
    return Check("replay", not num_failed, f"{num_failed} of {len(recent)} requests failed{reason}")
