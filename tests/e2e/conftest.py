"""What every module of whole runs shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.runs import Run


@pytest.fixture(scope="module", autouse=True)
def no_run_outlives_its_module() -> Iterator[None]:
    """A test that failed leaves its run going, which would take a core from every test behind it."""
    yield
    while Run.started:
        Run.started.pop().kill()
