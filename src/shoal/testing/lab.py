"""A fixture of pytest: labs for tests, which are skipped, visibly, where there can be none.

In a ``conftest.py``: ``pytest_plugins = ["shoal.testing.lab"]``. This is the one module that imports pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from shoal.lab import Lab, LabSpec, why_not


@pytest.fixture
def shoal_lab() -> Iterator[Callable[..., Lab]]:
    """Makes labs: ``shoal_lab(hosts=4, link="100mbit")`` takes what ``LabSpec`` takes. They are taken down after the
    test, the last first. Where this process cannot make one, the test is skipped, and the reason says what is missing.
    """
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as labs:

        def make(**asked: Any) -> Lab:
            return labs.enter_context(Lab(LabSpec(**asked)))

        yield make
