"""The error tree: yours to mend, the world's, ours.

Every message says what was needed, what came, and what to do. Every error survives pickling, because launchers carry
errors between processes.
"""

from __future__ import annotations

from typing import Any


class ShoalError(Exception):
    """The root. ``exit_code`` is what a command that fails with this error exits with."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(ShoalError):
    """Yours to mend: a job, an option, a file or a request that cannot be what was meant."""

    exit_code = 2


class Fault(ShoalError):
    """The world's: a peer, a link, a disk or a deadline. Carries where it was met."""

    def __init__(
        self,
        message: str,
        rank: int | None = None,
        generation: int | None = None,
        step: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.generation = generation
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.rank, self.generation, self.step)


class Halted(Fault):
    """This generation is over: a member was lost, or the membership changes. Meet again, then go on."""


class Behind(Fault):
    """Tables cannot stand at the step that the workers hold: they have lost what came after an earlier version."""


class LinkFault(Fault):
    """A control or transfer link did not answer in time, or refused the key."""


class StoreFault(Fault):
    """A version, generation or data file could not be read or written."""


class VersionFault(StoreFault):
    """A stored version is incomplete, altered, or of another format."""


class Diverged(Fault):
    """The loss or a gradient is no longer a finite number."""


class Bug(ShoalError):
    """Ours: an invariant of the design does not hold. Please report it with the event log."""
