"""Starts the ranks of an engine test, as torchrun would, and waits for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEADLINE_S = 240.0
ROOT = Path(__file__).parents[2]


def run_ranks(world: int, cases: Sequence[dict[str, Any]], out: Path, worker: str = "tests.invariance.engine_worker") -> None:
    """Runs the cases of ``worker`` on ``world`` ranks; the first rank that fails ends them all and shows its log."""
    out.mkdir(parents=True, exist_ok=True)
    plan = out / f"cases{world}.json"
    plan.write_text(json.dumps(list(cases)))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world):
            env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
            env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            with (out / f"world{world}-rank{rank}.log").open("wb") as log:
                command = [sys.executable, "-m", worker, str(plan), str(out)]
                processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
        for rank, process in enumerate(processes):
            status = process.wait(DEADLINE_S)
            log_text = (out / f"world{world}-rank{rank}.log").read_text()
            assert status == 0, f"rank {rank} of {world} ended with status {status}:\n{log_text[-4000:]}"
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)
