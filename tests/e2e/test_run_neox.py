"""Whole runs on a GPT-NeoX checkout: to the end, from its checkpoint on, and from recorded rollouts along the other engine's curve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import yaml

from neox_rl.step.main import RUN_DIR
from tests.e2e.runs import ROOT, Run
from tests.e2e.test_run import SHORT, STEPS
from tests.e2e.test_run_vllm import RL, SETTINGS

pytestmark = pytest.mark.neox
NEOX = "metarl.engine=gpt-neox"
Curve: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float64]]
LAYOUTS = {
    "one": (NEOX,),
    "tp2": (NEOX, "num_gpus=2", "model_parallel_size=2"),
    "pp2": (NEOX, "num_gpus=2", "pipe_parallel_size=2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def batches(runs: Path) -> Path:
    """What a run on the checkout trained on; the run itself is looked at here, and then goes on."""
    run = Run(runs, "whole", NEOX, *SHORT, f"metarl.debug.record_batches={runs}/batches")
    assert run.wait() == 0, run.said()
    assert run.steps() == STEPS and (run.paths.checkpoints / "latest").read_text().strip() == f"global_step{len(STEPS)}"
    assert (run.paths.root / "model" / "model.safetensors").is_file()
    last = STEPS[-1][1]
    again = Run(runs, "whole", NEOX, *SHORT, f"train_iters={last + 2}", flags=("--resume",))
    assert again.wait() == 0, again.said()
    assert again.steps() == [*STEPS, ("rl", last + 1), ("rl", last + 2)]
    return runs / "batches"


def replayed(batches: Path) -> tuple[str, ...]:
    return (*SHORT, "metarl.debug.mode=train_only", f"metarl.debug.batches={batches}")


def curve(run: Run) -> Curve:
    """Reward, loss, gradient norm and entropy of each step."""
    return np.array([[row.get("reward_mean", 0.0), row["loss"], row["grad_norm"], row.get("entropy", 0.0)] for row in run.metrics()])


@pytest.fixture(scope="module")
def expected(runs: Path, batches: Path) -> Curve:
    run = Run(runs, "megatron-core", *replayed(batches))
    assert run.wait() == 0, run.said()
    found = curve(run)
    assert len(found) >= 4 and np.ptp(found[:, 1]) > 1e-3
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_rollouts_give_the_curve_of_the_other_engine(runs: Path, batches: Path, expected: Curve, layout: str) -> None:
    run = Run(runs, layout, *replayed(batches), *LAYOUTS[layout])
    assert run.wait() == 0, run.said()
    np.testing.assert_allclose(curve(run), expected, rtol=1e-3, atol=1e-4)


def test_ranks_that_gpt_neox_itself_starts_from_inside_its_checkout(runs: Path, batches: Path, expected: Curve) -> None:
    """Its own deepy.py and launcher with our train.py, on a run that --prepare made; it refuses the block ``metarl``, so not with it."""
    run = Run(runs, "inside", *replayed(batches), NEOX, flags=("--prepare",))
    assert run.wait() == 0, run.said()
    keys = yaml.safe_load((ROOT / "configs/debug/train_only.yml").read_text())
    del keys["metarl"]
    keys |= {"max_position_embeddings": keys["seq_length"], "train_micro_batch_size_per_gpu": 1, "global_num_gpus": 1}
    keys |= {"optimizer": {"type": "Adam", "params": {"lr": 2e-4}}}
    (runs / "model.yml").write_text(yaml.safe_dump(keys))
    env = os.environ | {RUN_DIR: str(run.paths.root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "deepy.py", str(ROOT / "train.py"), str(runs / "model.yml")]
    done = subprocess.run(command, cwd=env["GPT_NEOX_PATH"], env=env, text=True, capture_output=True, timeout=150, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    np.testing.assert_allclose(curve(run), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_run_with_a_real_server(runs: Path, layout: str) -> None:
    """Asynchronous RL to its end; at equal versions the server computes what the checkout's model computes, sampled token by token."""
    run = Run(runs, f"vllm-{layout}", *SETTINGS, *LAYOUTS[layout])
    assert run.wait(280.0) == 0, run.said()
    assert run.gone()
    summary = run.summary()
    assert (summary["phase"], summary["steps"], summary["heldout_accuracy_final"]["n"]) == ("done", RL, 16)
    assert summary["rollouts_dropped"] == summary["rollouts_trained_twice"] == 0 and summary["max_staleness_seen"] <= 2
    assert abs(summary["mismatch_kl_max"]) <= 1e-5 and summary["weight_updates"] >= 2
