"""A short run in which everything is killed once, and some is stopped, joins and leaves: ``tools/chaos.py`` as a user calls it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.runs import ROOT


def test_a_tormented_run_ends_and_its_audit_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "tools/chaos.py", "configs/debug/fake_generator.yml", "--kills", "5", "--seed", "7"]
    command += ["--runs-dir", str(tmp_path), "--hang-s", "200", "--set", "train_iters=120"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said, _ = process.communicate(timeout=540.0)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its run
            raise
    assert process.returncode == 0 and "5 kills" in said and "0 violations" in said, said
    struck = set(re.findall(r"step +-?\d+  kill (\w+)", said))
    assert len(struck) >= 4, f"each role once before any twice: {said}"
