"""Who is in: a pure state machine from events to worlds and actions."""

from shoal.membership.changes import (
    Action,
    Announce,
    Attached,
    Await,
    DeadlinePassed,
    DealTaken,
    Dismiss,
    End,
    Event,
    Finished,
    Halt,
    Healed,
    Joined,
    LeaveAsked,
    Lost,
    Redeal,
    Reported,
    Scaled,
    Stalled,
    Stored,
)
from shoal.membership.machine import Phase, State, begin, step, take_over
from shoal.membership.world import NOTHING, Lanes, Origin, Rules, Standing, World

__all__ = [
    "NOTHING", "Action", "Announce", "Attached", "Await", "DeadlinePassed", "DealTaken", "Dismiss", "End", "Event",
    "Finished", "Halt", "Healed", "Joined", "Lanes", "LeaveAsked", "Lost", "Origin", "Phase", "Redeal", "Reported",
    "Rules", "Scaled", "Stalled", "Standing", "State", "Stored", "World", "begin", "step", "take_over",
]  # fmt: skip
