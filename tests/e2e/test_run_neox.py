"""Whole runs on a GPT-NeoX checkout: to the end, from its checkpoint on, and from recorded rollouts along the other engine's curve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.runs import Run
from tests.e2e.test_run import SHORT, STEPS

pytestmark = pytest.mark.neox
NEOX = "metarl.engine=gpt-neox"
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
    assert run.steps() == STEPS and (run.paths.checkpoints / "latest").read_text().strip() == "global_step8"
    assert (run.paths.root / "model" / "model.safetensors").is_file()
    again = Run(runs, "whole", NEOX, *SHORT, "train_iters=6", flags=("--resume",))
    assert again.wait() == 0, again.said()
    assert again.steps() == [*STEPS, ("rl", 5), ("rl", 6)]
    return runs / "batches"


def curve(runs: Path, batches: Path, name: str, *settings: str) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    run = Run(runs, name, *SHORT, "metarl.debug.mode=train_only", f"metarl.debug.batches={batches}", *settings)
    assert run.wait() == 0, run.said()
    return np.array([[row["loss"], row["grad_norm"], row.get("entropy", 0.0)] for row in run.metrics()])


@pytest.fixture(scope="module")
def expected(runs: Path, batches: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return curve(runs, batches, "megatron-core")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recorded_rollouts_give_the_curve_of_the_other_engine(
    runs: Path, batches: Path, expected: np.ndarray[tuple[int, int], np.dtype[np.float64]], layout: str
) -> None:
    found = curve(runs, batches, layout, *LAYOUTS[layout])
    assert len(found) >= 4 and np.ptp(expected[:, 0]) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
