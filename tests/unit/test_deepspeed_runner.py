"""What ranks on other nodes find in their environment: DeepSpeed's own runner and launcher, with a ``pdsh`` that writes down its words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$@" >> "$RECORD"\n'


def test_pdsh_is_told_the_variables_of_the_run(tmp_path: Path) -> None:
    for name in ("pdsh", "ssh"):
        (tmp_path / name).write_text(RECORDER)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    told = {
        "GPT_NEOX_PATH": "/share/gpt-neox",
        "NEOX_RL_ATTEMPT": "3",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WANDB_API_KEY": "k",
    }
    env = os.environ | told | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record"), "UNRELATED": "x"}
    command = [sys.executable, "-m", "neox_rl.engines.deepspeed_runner", "--launcher", "pdsh", "--hostfile", str(tmp_path / "hosts")]
    command += ["--master_addr", "10.0.0.1", "--num_gpus", "1", "train.py", "--run-dir", "runs/x"]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=60, check=False)
    said = (tmp_path / "record").read_text() if (tmp_path / "record").exists() else ""
    assert "first,second" in said, done.stdout + done.stderr
    for name, value in told.items():
        assert f"export {name}={value};" in said
    assert "UNRELATED" not in said
