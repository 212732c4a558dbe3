"""What a new generation needs: which version is the truth, who can work together, and which lanes have moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from shoal.membership.world import NOTHING, Origin, Standing, World


def choose_base(members: Sequence[str], pool: Mapping[str, Standing], stored: Standing) -> tuple[Standing, Origin]:
    """The newest version that a member holds or the store has, and where the members get it.

    Who holds nothing has no say, so a fresh process can never become the truth. If members at the newest step hold
    different states (they never should), the one that most of them hold wins, then the lowest rank's.
    """
    newest = max((pool[m].step for m in members), default=-1)
    if newest < 0 or newest < stored.step:
        return (stored, Origin.STORE) if stored != NOTHING else (Standing(0), Origin.SEED)
    held = [pool[m] for m in members if pool[m].step == newest]
    votes = Counter(held)
    base = max(held, key=lambda standing: (votes[standing], -held.index(standing)))
    return base, Origin.PEERS


def drop_unreachable(
    pool: Mapping[str, Standing], unreachable: Mapping[str, frozenset[str]], most: int
) -> tuple[list[str], list[str]]:
    """Split those present into who can all reach each other (at most ``most`` of them) and who is cut off.

    Whoever misses the most others goes first; among equals, who holds the older version, then the later name.
    Newcomers that are cut off only wait; a member that is cut off has stopped the others and is sent away.
    """
    cut = {frozenset((w, p)) for w, peers in unreachable.items() for p in peers if w in pool and p in pool and w != p}
    staying = set(pool)
    dropped: list[str] = []
    while True:
        misses = Counter(w for pair in cut if pair <= staying for w in pair)
        if not misses:
            break
        worst = max(misses, key=lambda w: (misses[w], -pool[w].step, w))
        staying.discard(worst)
        if pool[worst] != NOTHING:
            dropped.append(worst)
    ordered = sorted(staying, key=lambda w: (-pool[w].step, w))
    return ordered[:most], sorted(dropped)


def moved(before: World | None, world: World) -> frozenset[int]:
    """The lanes that have gone to another member than before."""
    if before is None:
        return frozenset()
    held = {lane: member for member, lanes in before.lanes.items() for lane in lanes}
    return frozenset(lane for m, lanes in world.lanes.items() for lane in lanes if held.get(lane) != m)
