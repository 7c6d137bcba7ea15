"""A checkpoint of GPT-NeoX's own training goes through RL and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neox_rl.run.endpoints import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("stock")
    port = str(free_port("127.0.0.1"))
    env = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tests.contracts.neox_stock", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result: dict[str, Any] = json.loads((out / "found.json").read_text())
    return result


@pytest.mark.neox
def test_rl_goes_on_from_a_stock_pretraining_checkpoint(found: dict[str, Any]) -> None:
    assert found["first losses"] == sorted(found["first losses"], reverse=True)
    assert found["client"] == {} and found["pretrained to ours"] < 1e-5 < found["moved"]


@pytest.mark.neox
def test_stock_training_goes_on_from_ours_with_its_policy_and_not_the_reference(found: dict[str, Any]) -> None:
    assert found["saved"] == "global_step2" and found["iteration"] == 2
    assert found["ours to stock"] < 1e-5
    assert found["adam steps"] == [2] and set(found["group steps"]) == {2}, "bias correction goes on, whichever Adam counts"
    assert found["last losses"] == sorted(found["last losses"], reverse=True)
