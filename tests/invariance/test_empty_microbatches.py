"""Micro-batches, and whole data-parallel ranks, without a sequence: no collective waits for them, and they change no step.

Prefix trees that are kept whole leave them. What is not covered: CUDA and NCCL.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.invariance.launching import run_ranks
from tests.invariance.test_engine_layouts import ENGINES, FAMILIES

SPARSE = {
    "megatron-core": ("pp2", "dp2", "dp2_zero1"),
    "gpt-neox": ("plain", "pp2", "dp2", "dp2_zero1", "plain_dp2_zero2", "plain_dp2_zero3"),
}


def reports_of(engine: str, out: Path) -> dict[str, list[np.ndarray]]:
    layouts = {layout: ENGINES[engine][layout] for layout in ("one", *SPARSE[engine])}
    for world in (1, 2):
        cases = [
            {"kind": "sparse", "engine": engine, "name": name, "neox": {**FAMILIES["llama"], **keys}, "accumulate": accumulate}
            for name, (ranks, keys, accumulate) in layouts.items()
            if ranks == world
        ]
        run_ranks(world, cases, out)
    return {name: [np.load(out / name / f"rank{rank}.npy") for rank in range(ranks)] for name, (ranks, _, _) in layouts.items()}


@pytest.mark.parametrize("engine", ["megatron-core", pytest.param("gpt-neox", marks=pytest.mark.neox)])
def test_empty_micro_batches_and_ranks_change_no_step(engine: str, tmp_path: Path) -> None:
    """Loss, gradient norm and metrics of three steps, on every rank, are those of one rank with one micro-batch."""
    found = reports_of(engine, tmp_path)
    (one,) = found.pop("one")
    assert one.shape == (3, 5) and (one[:, 1] > 0.1).all()
    for layout, ranks in found.items():
        for reports in ranks:
            np.testing.assert_allclose(reports, one, rtol=1e-5, err_msg=layout)
