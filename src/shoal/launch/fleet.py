"""What a launcher is to the driver: something that starts and ends workers and says which have ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Place:
    """Where a process can be started: the address that others reach it at, and the words before its command."""

    address: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gone:
    """A worker's process has ended."""

    name: str
    reason: str


class Fleet(Protocol):
    """Workers' processes, wherever they run."""

    host: str
    """The address that the coordinator is to listen on, for these workers to reach it."""
    wake_fd: int | None
    """A descriptor that can be read when ``gone`` has news, if there is one: it is then asked at once."""

    def places(self) -> list[Place]:
        """Where table shards can be started."""
        ...

    def start(self, name: str, address: str) -> None:
        """Begin to start a worker, which is to call the coordinator at ``address``; returns at once."""
        ...

    def kill(self, name: str) -> None:
        """End a worker that is frozen or cut off; one that is gone already is passed over."""
        ...

    def gone(self) -> list[Gone]:
        """Who has ended since the last call; does not wait."""
        ...

    def close(self) -> None:
        """End everything that is left."""
        ...
