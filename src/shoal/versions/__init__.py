"""Versions: what training has committed, stored whole or not at all. ``versions.store`` imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.versions.manifest import Manifest
    from shoal.versions.snapshot import Snapshot, capture, fingerprint, restore, with_ties
    from shoal.versions.store import Absent, Exists, Store
    from shoal.versions.versions import Refused, Versions
    from shoal.versions.writer import BackgroundWriter, Failed, Saved

_HOMES = {
    "manifest": ("Manifest",),
    "snapshot": ("Snapshot", "capture", "fingerprint", "restore", "with_ties"),
    "store": ("Absent", "Exists", "Store"),
    "versions": ("Refused", "Versions"),
    "writer": ("BackgroundWriter", "Failed", "Saved"),
}

__all__ = [
    "Absent",
    "BackgroundWriter",
    "Exists",
    "Failed",
    "Manifest",
    "Refused",
    "Saved",
    "Snapshot",
    "Store",
    "Versions",
    "capture",
    "fingerprint",
    "restore",
    "with_ties",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
