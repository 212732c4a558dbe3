"""Who hosts which lane."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shoal.errors import Bug, ConfigError


def deal(
    num_lanes: int,
    weights: Mapping[str, float],
    previous: Mapping[str, tuple[int, ...]] | None = None,
    spread: Collection[int] = (),
) -> dict[str, tuple[int, ...]]:
    """Every lane to one worker, in proportion to the weights, moving as few as possible from ``previous``.

    Shares are rounded by largest remainder, ties to who would else give up a lane and then to who comes first. A weight
    of 0 gets none. Of the lanes that are to be ``spread`` a worker keeps the part that it keeps of all of its lanes.
    Without ``previous`` each worker gets a run of neighbouring lanes. ``ConfigError`` if no weight is positive; ``Bug``
    if ``previous`` is no deal of these lanes.
    """
    bad = [name for name, weight in weights.items() if not 0 <= weight < float("inf")]
    if bad:
        raise ConfigError(f"weights must be finite and at least 0; {bad[0]} has {weights[bad[0]]}")
    if not any(weights.values()):
        raise ConfigError(f"{num_lanes} lanes need a worker with a positive weight; there is none")
    held = {name: tuple(sorted((previous or {}).get(name, ()))) for name in weights}
    dealt = [lane for lanes in held.values() for lane in lanes]
    if len(set(dealt)) < len(dealt) or not set(dealt) <= set(range(num_lanes)):
        raise Bug(f"each of {num_lanes} lanes was to be dealt once at most; they were dealt as {dict(previous or {})}")
    shares = _shares(num_lanes, weights, {name: len(lanes) for name, lanes in held.items()})
    kept = {name: _kept(lanes, shares[name], frozenset(spread)) for name, lanes in held.items()}
    taken = {lane for lanes in kept.values() for lane in lanes}
    free = iter([lane for lane in range(num_lanes) if lane not in taken])
    return {
        name: tuple(sorted((*kept[name], *(next(free) for _ in range(shares[name] - len(kept[name]))))))
        for name in weights
    }


def _kept(held: Sequence[int], most: int, spread: frozenset[int]) -> tuple[int, ...]:
    """At most so many of a worker's lanes, with an even part of those that are to be spread."""
    if len(held) <= most:
        return tuple(held)
    special = [lane for lane in held if lane in spread]
    others = [lane for lane in held if lane not in spread]
    num_special = round(len(special) * most / len(held))
    return (*special[:num_special], *others[: most - num_special])


def _shares(num_lanes: int, weights: Mapping[str, float], held: Mapping[str, int]) -> dict[str, int]:
    greatest = max(weights.values())
    parts = {name: weight / greatest for name, weight in weights.items() if weight}
    total = sum(parts.values())
    exact = {name: num_lanes * part / total for name, part in parts.items()}
    shares = {name: int(exact.get(name, 0)) for name in weights}
    by_remainder = sorted(exact, key=lambda name: (-round(exact[name] - shares[name], 9), held[name] <= shares[name]))
    for name in by_remainder[: num_lanes - sum(shares.values())]:
        shares[name] += 1
    return shares
