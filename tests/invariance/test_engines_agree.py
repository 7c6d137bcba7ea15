"""From the same HF weights and the same batch both engines reach the same log-probs, loss, gradient norm and next weights.

Both run in the same processes, one after the other: GPT-NeoX's ``megatron`` and megatron-core live together. What is not covered:
CUDA and NCCL. tests/e2e/test_run_neox.py compares whole runs on recorded rollouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.invariance.launching import run_ranks
from tests.invariance.test_engine_layouts import FAMILIES, LAYOUTS

pytestmark = pytest.mark.neox
COMPARED = ("one", "tp2", "pp2", "tp2_dp2_zero1")
ENGINES = ("megatron-core", "gpt-neox")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("agree")
    cases: dict[int, list[dict[str, Any]]] = {
        1: [{"name": f"export-{family}", "kind": "export", "neox": keys} for family, keys in FAMILIES.items()]
    }
    for layout in COMPARED:
        world, keys, accumulate = LAYOUTS[layout]
        for family, model in FAMILIES.items():
            common = {"kind": "first_step", "neox": {**model, **keys}, "accumulate": accumulate, "load_hf": str(hf(out, family))}
            cases.setdefault(world, []).extend({**common, "engine": e, "name": f"{layout}-{family}-{e}"} for e in ENGINES)
    for world, plan in cases.items():
        run_ranks(world, plan, out)
    return out


def hf(out: Path, family: str) -> Path:
    return out / f"export-{family}" / "hf"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", COMPARED)
class TestBothEngines:
    def both(self, found: Path, layout: str, family: str, rank: int = 0) -> tuple[Any, Any]:
        core, neox = (np.load(found / f"{layout}-{family}-{engine}" / f"rank{rank}.npz") for engine in ENGINES)
        return core, neox

    def test_log_probs_and_first_step(self, found: Path, layout: str, family: str) -> None:
        for rank in range(LAYOUTS[layout][0]):
            core, neox = self.both(found, layout, family, rank)
            np.testing.assert_allclose(neox["logprobs"], core["logprobs"], rtol=0, atol=1e-5)
            np.testing.assert_allclose(neox["report"], core["report"], rtol=1e-4, atol=0, err_msg="loss, gradient norm, entropy, log-prob")
            assert neox["report"][1] > 0.01, "the gradient norm"

    def test_next_weights(self, found: Path, layout: str, family: str) -> None:
        """Without the biases of keys: softmax does not see them, so their gradient is rounding alone, and Adam makes whole steps of it."""
        core, neox = self.both(found, layout, family)
        names = [name for name in core.files if name.startswith("w.")]
        assert names and set(names) == {name for name in neox.files if name.startswith("w.")}
        start = load_file(hf(found, family) / "model.safetensors")
        heads = FAMILIES[family]["num_attention_heads"]
        for name in names:
            before, mine, other = (np.asarray(tensor) for tensor in (start[name[2:]], neox[name], core[name]))
            if name.endswith("query_key_value.bias"):
                before, mine, other = (np.delete(tensor.reshape(heads, 3, -1), 1, 1) for tensor in (before, mine, other))
            assert np.linalg.norm(mine - other) <= 1e-4 * np.linalg.norm(other), name
            assert np.linalg.norm(mine - before) > 1e-3 * np.linalg.norm(before), f"{name} did not move"
