"""From the run's keys to what GPT-NeoX's NeoXArgs takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from neox_rl.config.neox import NeoXConfig

OURS = frozenset({"init_std", "save", "load", "num_gpus", "launcher", "hostfile", "master_addr", "distributed_backend"})
"""Declared keys that NeoXArgs does not get: the ranks are running, and checkpoints are written by the engine."""
EMPTY_IS_NONE = ("num_kv_heads", "intermediate_size", "checkpoint_factor", "keep_last_n_checkpoints")
COMPILED = ("scaled_upper_triang_masked_softmax_fusion", "scaled_masked_softmax_fusion", "rope_fusion")
"""What takes kernels of GPT-NeoX's own. Its build asks nvcc for sm_70, which CUDA 13 no longer compiles for; where they are missing,
its model ends the process with status 0."""
KERNELS = ("scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda", "fused_rotary_positional_embedding")
"""The modules of :data:`COMPILED`, which are built and found together."""
FUSED = (
    *COMPILED,
    "bias_dropout_fusion",
    "layernorm_fusion",
    "rmsnorm_fusion",
    "use_flashattn_swiglu",
)
"""CUDA kernels: where there is no CUDA the same functions are computed without them."""


def neox_arguments(
    neox: NeoXConfig, extra: Mapping[str, Any], *, world_size: int, padded_vocab: int, backend: str, cuda: bool, built: bool = False
) -> dict[str, Any]:
    """Arguments of NeoXArgs: the declared keys, and ``extra``, the ones that only GPT-NeoX knows, as they are.

    A micro-batch is one sample to DeepSpeed, whatever it holds; how many there are is set anew each step. ``built``: :data:`KERNELS` are
    installed; without them torch computes the same functions.
    """
    dp = world_size // (neox.model_parallel_size * neox.pipe_stages)
    found = {key: value for key, value in asdict(neox).items() if key not in OURS}
    found |= {key: found[key] or None for key in EMPTY_IS_NONE}
    found |= {"max_position_embeddings": neox.max_positions, "zero_optimization": {"stage": 0, **neox.zero_optimization}}
    found |= {
        "pos_emb": "rotary",
        "init_method_std": neox.init_std,
        "bias_gelu_fusion": False,
        "partition_activations": False,
        "use_wandb": False,
        "tokenizer_type": "HFTokenizer",  # the run's tokenizer.json, as GPT-NeoX reads it; it loads no checkpoint that says another type
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **extra,
        "global_num_gpus": world_size,
        "distributed_backend": backend,
        "train_batch_size": dp,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "padded_vocab_size": padded_vocab,
        "train_iters": max(neox.train_iters, 1),
        "steps_per_print": 1 << 30,
        "deepspeed": True,
    }
    if not built:
        found |= dict.fromkeys(COMPILED, False)
    if not cuda:
        found |= dict.fromkeys(FUSED, False) | {"attention_config": [[["global"], neox.num_layers]]}
    if found["zero_optimization"]["stage"] == 3:
        # Without it small parameters stay whole on each rank after their first use, beside the shares that the reference is exchanged with.
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if neox.precision == "fp16":
        found["fp16"] = {**(extra.get("fp16") or {}), "enabled": True}
    if neox.precision != "fp32":
        # DeepSpeed sums half precision gradients in fp32 under ZeRO 1 alone; sharding optimizer states changes no number.
        found["data_types"] = {"grad_accum_dtype": "fp32", **(extra.get("data_types") or {})}
        found["zero_optimization"]["stage"] = max(1, found["zero_optimization"]["stage"])
    return found
