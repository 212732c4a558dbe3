"""Who hosts which lane."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.errors import ConfigError


def deal(
    num_lanes: int, weights: Mapping[str, float], previous: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Every lane to one worker, in proportion to the weights, moving as few as possible from ``previous``.

    Shares are rounded by largest remainder, ties to who already has more and then to who comes first. A weight of 0
    gets none. Without ``previous`` each worker gets a run of neighbouring lanes. ``ConfigError`` if no weight is
    positive.
    """
    bad = [name for name, weight in weights.items() if not 0 <= weight < float("inf")]
    if bad:
        raise ConfigError(f"weights must be finite and at least 0; {bad[0]} has {weights[bad[0]]}")
    if not any(weights.values()):
        raise ConfigError(f"{num_lanes} lanes need a worker with a positive weight; there is none")
    held = {name: tuple(sorted((previous or {}).get(name, ()))) for name in weights}
    shares = _shares(num_lanes, weights, {name: len(lanes) for name, lanes in held.items()})
    kept = {name: lanes[: shares[name]] for name, lanes in held.items()}
    taken = {lane for lanes in kept.values() for lane in lanes}
    free = iter(lane for lane in range(num_lanes) if lane not in taken)
    return {
        name: tuple(sorted((*kept[name], *(next(free) for _ in range(shares[name] - len(kept[name]))))))
        for name in weights
    }


def _shares(num_lanes: int, weights: Mapping[str, float], held: Mapping[str, int]) -> dict[str, int]:
    total = sum(weights.values())
    exact = {name: num_lanes * weight / total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    order = {name: position for position, name in enumerate(weights)}
    by_remainder = sorted(
        (name for name in weights if weights[name] > 0),
        key=lambda name: (-round(exact[name] - shares[name], 9), -min(held[name], shares[name] + 1), order[name]),
    )
    for name in by_remainder[: num_lanes - sum(shares.values())]:
        shares[name] += 1
    return shares
