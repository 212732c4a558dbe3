"""Faults that are done to a lab: at once, or each in its time while a command runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from shoal.clock import Clock, SystemClock
from shoal.errors import ShoalError
from shoal.lab.cluster import Lab
from shoal.lab.faults import HostFault
from shoal.lab.spec import parse_cores


def inflict(lab: Lab, fault: HostFault) -> None:
    """Do it now, whatever its time."""
    match fault.do:
        case "cut":
            lab.cut(fault.host)
        case "heal":
            lab.heal(fault.host)
        case "slow":
            lab.slow(fault.host, fault.to)
        case "kill":
            lab.kill(fault.host)
        case "freeze":
            lab.freeze(fault.host)
        case "thaw":
            lab.thaw(fault.host)
        case "cpu":
            asked = lab.record.hosts[fault.host].cores
            lab.cpu(fault.host, parse_cores(fault.to) if fault.to else asked)


@contextmanager
def inflicting(
    lab: Lab, faults: Sequence[HostFault], say: Callable[[str], None], clock: Clock | None = None
) -> Iterator[None]:
    """Do each fault at its time, counted from now, until the block ends. What cannot be done is said, not raised."""
    over = threading.Event()
    time = clock or SystemClock()
    began_s = time.monotonic_s()

    def play() -> None:
        for fault in sorted(faults, key=lambda fault: fault.at_s):
            if over.wait(max(0.0, began_s + fault.at_s - time.monotonic_s())):
                return
            try:
                inflict(lab, fault)
                say(f"{time.monotonic_s() - began_s:.2f} s: {fault}")
            except ShoalError as error:
                say(f"{fault} could not be done: {error}")

    thread = threading.Thread(target=play, name="lab faults", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
