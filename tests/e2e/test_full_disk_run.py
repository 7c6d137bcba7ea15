"""Whole runs on a small file system that fills up: they wait for room, lose nothing, and say so where none comes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT

NAMESPACES = ("unshare", "--user", "--map-root-user", "--mount")


def may_mount(directory: Path) -> str:
    """Why this kernel lets nobody mount a file system of their own; empty where it does."""
    argv = [*NAMESPACES, "mount", "-t", "tmpfs", "-o", "size=64k", "neox-rl-test", str(directory)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        return "there is no unshare"
    return "" if done.returncode == 0 else done.stderr.strip() or f"unshare ended with {done.returncode}"


@pytest.mark.parametrize("story", ["goes_on", "gives_up"])
def test_a_run_whose_disk_is_full_waits_for_room_loses_nothing_and_ends_in_time_with_a_clear_word(tmp_path: Path, story: str) -> None:
    if refused := may_mount(tmp_path):
        pytest.skip(f"no small file system to fill: {refused}")
    argv = [*NAMESPACES, sys.executable, "-m", "tests.e2e.full_disk", str(tmp_path), story]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
