"""HF -> GPT-NeoX -> HF, bit by bit: through the engine's own checkpoints in every layout, and through tools/neox_checkpoint.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from neox_rl.config.derived import hf_config
from neox_rl.config.neox import NeoXConfig
from neox_rl.config.run import RunConfig
from neox_rl.engines.hf_files import write_hf
from neox_rl.engines.model_shape import model_shape
from tests.invariance.engine_batches import VOCAB
from tests.invariance.launching import ROOT, run_ranks

pytestmark = pytest.mark.neox
BASE = {"hidden_size": 64, "num_attention_heads": 4, "num_layers": 2, "seq_length": 64}
LLAMA = {**BASE, "norm": "rmsnorm", "activation": "swiglu", "use_bias_in_attn_linear": False, "use_bias_in_mlp": False}
MODELS: dict[str, dict[str, Any]] = {
    "pythia": {**BASE, "rotary_pct": 0.25, "gpt_j_residual": True},
    "sequential": {**BASE, "rotary_pct": 0.25},
    "llama": {**LLAMA, "intermediate_size": 138},
    "grouped": {**LLAMA, "intermediate_size": 138, "num_kv_heads": 2},
}
"""The vocabulary of 101 is padded to 104, at TP 2 to 112; the gated MLP is 46 wide, 23 columns a rank at TP 2."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "plain": (1, {"pipe_parallel_size": 0}),
    "tp2": (2, {"model_parallel_size": 2}),
    "plain_tp2": (2, {"model_parallel_size": 2, "pipe_parallel_size": 0}),
    "pp2": (2, {"pipe_parallel_size": 2}),
}
TOOL = {"pythia": "plain_tp2", "grouped": "pp2"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One HF checkpoint a model, with no special value in it."""
    out = tmp_path_factory.mktemp("given")
    for name, keys in MODELS.items():
        config, generator = RunConfig(NeoXConfig(**keys)), torch.Generator().manual_seed(0)
        shapes = model_shape(config, VOCAB).hf_shapes()
        tensors = {key: torch.randn(size, generator=generator) for key, size in shapes.items()}
        write_hf(out / name, tensors, hf_config(config, VOCAB))
    return out


@pytest.fixture(scope="module")
def through_the_engine(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, cases = tmp_path_factory.mktemp("back"), dict[int, list[dict[str, Any]]]()
    for layout, (world, keys) in LAYOUTS.items():
        for model, shape in MODELS.items():
            case = {"engine": "gpt-neox", "kind": "round_trip", "name": f"{model}-{layout}", "neox": {**shape, **keys}}
            cases.setdefault(world, []).append({**case, "load_hf": str(given / model)})
    for world, plan in cases.items():
        run_ranks(world, plan, out)
    return out


def equal_bit_by_bit(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(path / "model.safetensors") for path in (found, expected))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (found / "config.json").read_text() == (expected / "config.json").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_through_the_engine(through_the_engine: Path, given: Path, model: str, layout: str) -> None:
    equal_bit_by_bit(through_the_engine / f"{model}-{layout}" / "hf", given / model)


def test_pretraining_checkpoints_under_zero_3(tmp_path: Path) -> None:
    """DeepSpeed keeps the weights with the optimizer's states then, and passes over them where only weights are asked for."""
    zero = {stage: {"pipe_parallel_size": 0, "zero_optimization": {"stage": stage}} for stage in (1, 3)}
    case = {"engine": "gpt-neox", "kind": "foreign"}
    same = {**case, "name": "same", "neox": {**MODELS["llama"], **zero[3]}}
    other = {**case, "name": "other", "neox": {**MODELS["llama"], **zero[1]}, "then": zero[3]}
    run_ranks(2, [same, other], tmp_path)
    data, refused = (np.load(tmp_path / name / "rank0.npz") for name in ("same", "other"))
    names = [name for name in data.files if name.startswith("w.")]
    assert names and not data["said"].item() and all(np.array_equal(data[name], data[f"r.{name[2:]}"]) for name in names)
    assert "was not written under ZeRO 3" in refused["said"].item()


@pytest.mark.parametrize("model", TOOL)
def test_through_the_tool(given: Path, tmp_path: Path, model: str) -> None:
    world, keys = LAYOUTS[TOOL[model]]
    written = tmp_path / "model.yml"
    written.write_text(yaml.safe_dump({**MODELS[model], **keys}))

    def convert(direction: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command += ["tools/neox_checkpoint.py", direction, str(written), "--checkpoint", str(tmp_path / "ckpt"), *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=120, check=False)

    for arguments in (("to-neox", "--hf", str(given / model)), ("to-hf", "--hf", str(tmp_path / "hf"), "--vocab", str(VOCAB))):
        done = convert(*arguments)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    equal_bit_by_bit(tmp_path / "hf", given / model)
