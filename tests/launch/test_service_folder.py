"""Where a service tells of itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.launch.services import ServiceFolder


def test_one_service_has_a_folder_at_a_time(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path / "one")
    lock = folder.claim()
    with pytest.raises(ConfigError, match="a service one runs already"):
        folder.claim()
    os.close(lock)
    os.close(folder.claim())


def test_a_place_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"runs/\.services/one, which cannot be written: .*SHOAL_RUNS"):
        ServiceFolder(tmp_path / "runs" / ".services" / "one").claim()
