"""The run's chain of generations: one record a number, created only if no one has created it."""

from __future__ import annotations

import msgspec

from shoal.membership import NOTHING, Standing, World
from shoal.versions.store import Absent, Exists, Store

_FOLDER = "generations"


class Generations:
    """Generation records in a run's store. Whoever fails to create the next one has been replaced."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def record(self, world: World) -> bool:
        """Create the world's record; False if its number is taken."""
        try:
            self._store.create(f"{_FOLDER}/{world.generation:010d}.json", msgspec.json.encode(world))
        except Exists:
            return False
        return True

    def holds(self, number: int) -> bool:
        """Whether the store that is seen from here has this generation's record."""
        try:
            self._store.read(f"{_FOLDER}/{number:010d}.json")
        except Absent:
            return False
        return True

    def newest_number(self) -> int:
        """The highest number taken, 0 with none."""
        numbers = [int(name.removesuffix(".json")) for name in self._store.list(_FOLDER) if name.endswith(".json")]
        return max(numbers, default=0)

    def newest(self) -> World | None:
        number = self.newest_number()
        if number == 0:
            return None
        return msgspec.json.decode(self._store.read(f"{_FOLDER}/{number:010d}.json"), type=World)

    def newest_stored(self) -> Standing:
        """The newest version in the store, by its manifest alone."""
        steps = sorted((int(name) for name in self._store.list("versions") if name.isdigit()), reverse=True)
        for step in steps:
            if "manifest.json" in self._store.list(f"versions/{step:010d}"):
                manifest = msgspec.json.decode(self._store.read(f"versions/{step:010d}/manifest.json"))
                return Standing(step, manifest["fingerprint"])
        return NOTHING
