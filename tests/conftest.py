"""Tests: one math thread a process, the same examples each time; ``neox`` ones skip where there is no checkout."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; inherited by every process that a test starts
settings.load_profile("ci")  # the same examples each time, and no deadline an example: before any test module is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("GPT_NEOX_PATH"):
        for item in items:
            if item.get_closest_marker("neox"):
                item.add_marker(pytest.mark.skip(reason="needs a GPT-NeoX checkout, and GPT_NEOX_PATH is not set"))
