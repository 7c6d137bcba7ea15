"""The files that come with GPT-NeoX, and the keys that it knows: each is honored, noted, or refused in one clear line."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from neox_rl.config.checkout import find_checkout, known_keys
from neox_rl.config.load import parse
from neox_rl.config.machine import Machine
from neox_rl.config.neox import NeoXConfig
from neox_rl.config.neox_compat import ELSEWHERE, NOT_READ, ONLY
from neox_rl.config.rules import broken
from neox_rl.errors import ConfigError

pytestmark = pytest.mark.neox
RL = """
metarl:
  engine: gpt-neox
  pack_tokens: 16384
  warmstart: {tokens_per_step: 16384}
"""
REFUSED = {
    "1-3B-transformer-engine": "te_layernorm_mlp",
    "125M-dmoe": "moe_num_experts",
    "bnb_125M": "use_bnb_optimizer",
    "finetuning_configs/6-9B": "load_from_fp32_weights",
    "gmlp_small": "gmlp",
    **{f"llama2/{name}": "use_bias_in_mlp" for name in ("7B", "13B", "70B", "codellama_7B", "codellama_34B")},
    "llemma/7B": "decay_lr_to",
    "llemma/34B": "attention_type",
    **{f"mamba/mamba-{size}": "mamba" for size in ("130M", "370M", "790M", "1.4B", "2.8B")},
    "mistral/7B": "sliding_window_width",
    "rwkv/170M": "rwkv",
    "slurm_125M": "hostfile",
    "sparse": "local",
}
"""What its file asks for and no served model, or no release of GPT-NeoX, has. The Llama 2 ones leave biases in the MLP."""
TO_DEEPSPEED_AND_MODEL = frozenset(
    {
        *("checkpoint", "comms_logger", "communication_data_type", "curriculum_seqlen", "deepscale", "deepscale_config"),
        *("deepspeed_extra_args", "dump_state", "flops_profiler", "fused_kernels_build_path", "gradient_predivide_factor", "onnx_safe"),
        *("attention_softmax_in_fp32", "pipe_partition_method", "prescale_gradients", "rotary_save_freqs_buffer", "sparse_attention"),
        *("sparse_gradients", "sparsity_config", "use_cpu_initialization", "te_fp8_amax_compute_algo", "te_fp8_amax_history_len"),
        *("te_fp8_format", "te_fp8_margin", "te_fp8_wgrad"),
    }
)
"""What the model and DeepSpeed's engine read as it is written."""


def test_every_file_of_the_checkout_loads_or_says_why_not(tmp_path: Path) -> None:
    root = find_checkout(os.environ)
    (tmp_path / "rl.yml").write_text(RL)
    machine = replace(Machine((0, 1)), num_gpus=16, gpt_neox_path=str(root), exists=lambda _: True)
    found: dict[str, str] = {}
    for path in sorted((root / "configs").rglob("*.yml")):
        settings = ["num_gpus=8", "load=", "hostfile="]
        try:
            messages = broken(parse([path, tmp_path / "rl.yml"], settings).config, machine)
        except ConfigError as error:
            messages = str(error).splitlines()
        if messages:
            found[str(path.relative_to(root / "configs").with_suffix(""))] = "\n".join(messages)
    assert found.keys() == REFUSED.keys(), found
    assert all(REFUSED[name] in message for name, message in found.items()), found


def test_no_key_of_the_checkout_is_passed_over_without_a_word() -> None:
    declared = {field.name for field in fields(NeoXConfig)} | {"fp16", "bf16", "attention_config"}
    left = known_keys(find_checkout(os.environ)) - declared - NOT_READ.keys() - ONLY.keys() - ELSEWHERE.keys()
    assert left == TO_DEEPSPEED_AND_MODEL
