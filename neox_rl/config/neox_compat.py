"""GPT-NeoX keys that this project does not read, so that an existing NeoX file can be given as it is.

A key here either changes nothing (kernel choices, GPT-NeoX's own data and logging) and is accepted with a note, or would change the
model or the training and is accepted only with the value that the run has anyway. Every other unknown key is an error.

The engine ``gpt-neox`` hands on what the checkout itself reads: kernels, memory, data, and every key that is not known here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from neox_rl.config.source import SETTING, Entry
from neox_rl.errors import ConfigError

KERNEL = "a choice of CUDA kernels; results are the same"
DATA = "training data are the run's own rollouts and demonstrations"
BATCH = "batches are metarl.rollout.groups_per_step groups, packed by metarl.pack_tokens"
LOG = "logging is set in metarl.logging and metarl.evaluation"
CHECKPOINT = "checkpoints are set by checkpoint_factor, save and load"
INITIAL = "initial weights are normal with init_std"
SCHEDULE = "schedules run over train_iters"
MEMORY = "memory planning of GPT-NeoX's own engine"
LAUNCH = "launcher says how the ranks start"

NOT_READ: Mapping[str, str] = {
    **dict.fromkeys(("scaled_upper_triang_masked_softmax_fusion", "scaled_masked_softmax_fusion", "bias_dropout_fusion"), KERNEL),
    **dict.fromkeys(
        ("rope_fusion", "layernorm_fusion", "rmsnorm_fusion", "use_flashattn_swiglu", "async_tensor_model_parallel_allreduce"), KERNEL
    ),
    "bias_gelu_fusion": "gelu is exact here, never its tanh approximation",
    **dict.fromkeys(("data_path", "data_impl", "split", "num_workers", "mmap_warmup", "tokenizer_type", "vocab_file", "merge_file"), DATA),
    **dict.fromkeys(("train_data_paths", "valid_data_paths", "test_data_paths", "train_data_weights", "valid_data_weights"), DATA),
    **dict.fromkeys(("test_data_weights", "weight_by_num_documents", "weighted_sampler_alpha"), DATA),
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), BATCH),
    **dict.fromkeys(
        ("log_interval", "steps_per_print", "log_dir", "tensorboard_dir", "wall_clock_breakdown", "eval_interval", "eval_iters"), LOG
    ),
    **dict.fromkeys(("use_wandb", "wandb_group", "wandb_team", "wandb_project", "wandb_host", "wandb_run_name", "log_grad_norm"), LOG),
    **dict.fromkeys(("extra_save_iters", "checkpoint_validation_with_forward_pass", "finetune"), CHECKPOINT),
    "checkpoint_scale": CHECKPOINT,
    **dict.fromkeys(("init_method", "output_layer_init_method", "init_method_std"), INITIAL),
    **dict.fromkeys(("lr_decay_iters", "override_lr_scheduler", "use_checkpoint_lr_scheduler"), SCHEDULE),
    **dict.fromkeys(("partition_activations", "synchronize_each_layer", "checkpoint_num_layers", "contiguous_checkpointing"), MEMORY),
    **dict.fromkeys(
        ("deepspeed_activation_checkpointing", "checkpoint_in_cpu", "activation_checkpointing", "data_types", "fp32_allreduce"), MEMORY
    ),
    **dict.fromkeys(("deepspeed_slurm", "deepspeed_mpi"), LAUNCH),
}

ONLY: Mapping[str, tuple[Any, ...]] = {
    "pos_emb": ("rotary",),
    "hidden_dropout": (0,),
    "attention_dropout": (0,),
    "use_qk_layernorm": (False,),
    "gpt_j_tied": (False,),
    "output_layer_parallelism": ("column",),
    "apply_query_key_layer_scaling": (False,),
    "sliding_window_width": (None,),
    "expansion_factor": (None, 4),
    "num_experts": (None, 1),
    "moe_num_experts": (None, 1),
    "lora": (None, False),
    "context_parallel_size": (1,),
    "deepspeed": (True,),
    "lr_decay_fraction": (None, 1),
    "use_mup": (None, False),
    "soft_prompt_tuning": (None,),
    "opt_pos_emb_offset": (None, 0),
}

ELSEWHERE: Mapping[str, str] = {
    "master_port": "set metarl.network.master_port",
    "seed": "set metarl.seed",
    **dict.fromkeys(("num_nodes", "include", "exclude"), "name the hosts, and the slots of each, in hostfile"),
}
"""Keys that GPT-NeoX takes and that have another name here: handed on, they would be passed over without a word."""


HANDED_ON = (KERNEL, MEMORY, DATA)
"""Of the keys that are not read, those that the engine ``gpt-neox`` gives to GPT-NeoX."""


def sort_out(table: Mapping[str, Entry], known: Collection[str], gpt_neox: bool) -> tuple[dict[str, Entry], dict[str, Any], list[str]]:
    """``table`` without the keys that are not read; those that go to GPT-NeoX; one note a key that was dropped.

    ``known`` are the paths of this project. Raises ConfigError for a value that would make another model or training.
    """
    kept: dict[str, Entry] = {}
    extra: dict[str, Any] = {}
    notes: list[str] = []
    for key, entry in table.items():
        if key in NOT_READ and not (gpt_neox and NOT_READ[key] in HANDED_ON):
            notes.append(f"{key} ({entry.where}) is not read: {NOT_READ[key]}")
            continue
        if key in ELSEWHERE:
            if entry.value is None:
                continue
            raise ConfigError(f"{key} = {entry.value!r} ({entry.where}): is not read here; {ELSEWHERE[key]} instead")
        if key == "fp16" and not gpt_neox:
            continue
        if key == "attention_config":
            _plain_attention(entry)
        elif key in ONLY and entry.value not in ONLY[key]:
            allowed = " or ".join(str(v).lower() for v in ONLY[key] if v is not None)
            raise ConfigError(f"{key} = {entry.value!r} ({entry.where}): only {allowed or 'null'} is supported here; remove the key")
        if key in known or "." in key:
            kept[key] = entry
        elif gpt_neox:
            extra[key] = entry.value
        elif key not in ONLY and key != "attention_config":
            kept[key] = entry
    return kept, extra, notes


def _plain_attention(entry: Entry) -> None:
    """NeoX's ``[[["flash"], 12]]``: every layer must be full causal attention."""

    def kinds(value: object) -> set[str]:
        return {value} if isinstance(value, str) else set().union(*map(kinds, value)) if isinstance(value, list) else set()

    other = kinds(entry.value) - {"flash", "global", "all"}
    if other:
        raise ConfigError(
            f"attention_config uses {sorted(other)} ({entry.where}): only flash or global (full causal attention) is supported here"
        )


def precision_blocks(table: Mapping[str, Entry]) -> dict[str, Entry]:
    """NeoX's ``fp16: {enabled, type}`` and ``bf16: {enabled}`` blocks turned into ``precision``. Raises ConfigError where they disagree.

    ``--set precision=...`` has the last word, so that a NeoX file with an fp16 block can be used as it is. What an fp16 block says of
    loss scaling stays, without the words that DeepSpeed does not know in it.
    """
    result = {key: entry for key, entry in table.items() if key not in ("fp16", "bf16")}
    blocks = [] if "precision" in table and table["precision"].where == SETTING else [b for b in ("fp16", "bf16") if b in table]
    asked = {name: _precision_of(name, table[name]) for name in blocks}
    asked = {name: precision for name, precision in asked.items() if precision}
    if "precision" in result and result["precision"].value is not None:
        asked["precision"] = result["precision"].value
    if len(set(asked.values())) > 1:
        places = ", ".join(f"{name} ({table[name].where}) asks for {precision}" for name, precision in asked.items())
        raise ConfigError(f"precision is given in ways that disagree: {places}; keep one")
    for name, precision in asked.items():
        result["precision"] = Entry(precision, table[name].where)
    if "precision" in result and result["precision"].value == "fp16" and "fp16" in table:
        scaling = {key: value for key, value in table["fp16"].value.items() if key not in ("enabled", "type", "fp16")}
        if scaling:
            result["fp16"] = Entry(scaling, table["fp16"].where)
    return result


def _precision_of(name: str, entry: Entry) -> str:
    block = entry.value
    if not isinstance(block, dict) or not isinstance(block.get("enabled", False), bool):
        raise ConfigError(f"{name} = {block!r} ({entry.where}): must be a block like {{enabled: true}}; or write precision: bfloat16")
    if not block.get("enabled", False):
        return ""
    return "bfloat16" if name == "bf16" or block.get("type") in ("bfloat16", "bf16") else "fp16"
