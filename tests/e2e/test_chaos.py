"""A short run in which everything is killed once, and some is stopped, joins and leaves: ``tools/chaos.py`` as a user calls it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.runs import ROOT


def test_a_tormented_run_ends_and_its_audit_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "tools/chaos.py", "configs/debug/fake_generator.yml", "--kills", "6", "--seed", "7"]
    command += ["--runs-dir", str(tmp_path), "--hang-s", "200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills" in done.stdout and "0 violations" in done.stdout
    struck = set(re.findall(r"step +-?\d+  kill (\w+)", done.stdout))
    assert len(struck) >= 4, f"each role once before any twice: {done.stdout}"
