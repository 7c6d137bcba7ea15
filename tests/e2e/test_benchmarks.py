"""The benchmarks, and the experiment, that need no server run. Their figures are not looked at: this machine is busy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [("bench_train_step.py",), ("bench_weights.py", "--only", "transfer")], ids=lambda words: words[0])
def test_a_benchmark_prints_its_table_and_its_ratio(command: tuple[str, ...]) -> None:
    argv = [sys.executable, str(ROOT / "tools" / command[0]), *command[1:], "--quick"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "|---|" in done.stdout
    assert "wanted >=" in done.stdout


def test_the_experiment_without_a_policy_prints_its_table_and_draws_its_picture(tmp_path: Path) -> None:
    argv = [sys.executable, str(ROOT / "tools/experiments/without_policy.py"), "--quick", "--work", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "| best-first | oracle |" in done.stdout
    assert (tmp_path / "quick/without_policy.png").is_file()
