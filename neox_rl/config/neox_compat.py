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
LAUNCH = "launcher, num_gpus and hostfile say how the ranks start"
OBJECTIVE = "the objective is metarl.objective"
SERVING = "generation is the servers': metarl.rollout and metarl.servers"
ENDS = "a run ends after train_iters steps"
DERIVED = "GPT-NeoX derives it from other keys, whatever is written"
OTHERS = "it belongs to an architecture or a parametrization that is not used"

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
    **dict.fromkeys(("deepspeed_slurm", "deepspeed_mpi", "account", "comment", "force_multi", "no_ssh_check", "global_num_gpus"), LAUNCH),
    **dict.fromkeys(
        ("allow_chopped", "dataset_impl", "pack_impl", "eod_mask_loss", "use_shared_fs", "short_seq_prob", "reinforce_leave_one_out"), DATA
    ),
    **dict.fromkeys(("online_dataserver_ips", "online_dataserver_ports"), DATA),
    **{
        f"{sign}{part}_{kind}data_paths": DATA
        for part in ("train", "valid", "test")
        for sign, kind in (("pos_", ""), ("neg_", ""), ("pos_", "label_"), ("neg_", "label_"), ("", "label_"), ("", "reward_"))
    },
    **dict.fromkeys(
        ("kl_impl", "kl_div_beta", "fp32_reinforce", "fp16_lm_cross_entropy", "dpo_beta", "dpo_fp32", "dpo_reference_free"), OBJECTIVE
    ),
    **dict.fromkeys(("kto_beta", "kto_fp32", "kto_desirable_weight", "kto_undesirable_weight"), OBJECTIVE),
    **dict.fromkeys(("serve_model_weights", "weight_server_port", "maximum_tokens", "num_samples", "prompt_end", "recompute"), SERVING),
    **dict.fromkeys(
        ("return_logits", "sample_input_file", "sample_output_file", "temperature", "text_gen_type", "top_k", "top_p"), SERVING
    ),
    **dict.fromkeys(("eval_tasks", "eval_results_prefix", "char_level_ppl", "do_train", "do_valid", "do_test"), LOG),
    **dict.fromkeys(("use_comet", "comet_workspace", "comet_project", "comet_experiment_name", "comet_tags", "comet_others"), LOG),
    **dict.fromkeys(("comet_experiment", "wandb_init_all_ranks", "csv_monitor", "tensorboard", "wandb", "peak_theoretical_tflops"), LOG),
    **dict.fromkeys(("log_grad_pct_zeros", "log_param_norm", "log_optimizer_states", "log_gradient_noise_scale"), LOG),
    **dict.fromkeys(
        ("gradient_noise_scale_n_batches", "gradient_noise_scale_cpu_offload", "memory_profiling", "memory_profiling_path"), LOG
    ),
    **dict.fromkeys(("profile", "profile_backward", "profile_step_start", "profile_step_stop"), LOG),
    **dict.fromkeys(("no_load_optim", "no_load_rng", "no_save_optim", "no_save_rng", "s3_path", "s3_chunk_size", "iteration"), CHECKPOINT),
    **dict.fromkeys(("exit_interval", "adlr_autoresume", "adlr_autoresume_interval"), ENDS),
    **dict.fromkeys(("lr", "clip_grad", "optimizer_type", "scheduler", "batch_size", "padded_vocab_size", "is_pipe_parallel"), DERIVED),
    **dict.fromkeys(("zero_stage", "zero_reduce_scatter", "zero_contiguous_gradients", "zero_reduce_bucket_size"), DERIVED),
    **dict.fromkeys(("zero_allgather_bucket_size", "dynamic_loss_scale", "loss_scale", "loss_scale_window", "hysteresis"), DERIVED),
    **dict.fromkeys(("min_scale", "rank", "local_rank", "world_size", "user_script", "config_files", "git_hash", "lazy_mpu_init"), DERIVED),
    **dict.fromkeys(
        ("base_shapes_file", "coord_check", "save_base_shapes", "mup_attn_temp", "mup_embedding_mult", "mup_init_scale"), OTHERS
    ),
    **dict.fromkeys(("mup_output_temp", "mup_rp_embedding_mult", "mup_width_scale", "rpe_max_distance", "rpe_num_buckets"), OTHERS),
    **dict.fromkeys(("gmlp_attn_dim", "dim_att", "ffn_dim", "head_size", "scalenorm_epsilon", "param_sharing_style"), OTHERS),
    **dict.fromkeys(("moe_expert_interval", "moe_jitter_eps", "moe_lbl_in_fp32", "moe_router_type", "moe_top_k"), OTHERS),
    **dict.fromkeys(("mamba_causal_conv_fusion", "mamba_inner_func_fusion", "mamba_selective_scan_fusion"), OTHERS),
    **dict.fromkeys(("mamba_selective_fp32_params", "mamba_use_bias_in_conv", "mamba_use_bias_in_linears"), OTHERS),
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
    "train_impl": (None, "normal", "reinforce"),
    "z_loss": (None, 0),
    "train_epochs": (None,),
    "precompute_model_name": (None,),
    "use_bnb_optimizer": (None, False),
    "num_unique_layers": (None,),
    **dict.fromkeys(("te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha", "te_fp8_mha"), (None, False)),
    **dict.fromkeys(("autotuning", "curriculum_learning", "data_efficiency", "compression_training", "elasticity", "amp"), (None,)),
    "autotuning_run": (None,),
}

ELSEWHERE: Mapping[str, str] = {
    "master_port": "set metarl.network.master_port",
    "seed": "set metarl.seed",
    **dict.fromkeys(("num_nodes", "include", "exclude"), "name the hosts, and the slots of each, in hostfile"),
}
"""Keys that GPT-NeoX takes and that have another name here: handed on, they would be passed over without a word."""

PRECISION_BLOCKS = ("fp16", "bf16")
TOKENIZER = ("tokenizer_type", "vocab_file", "merge_file")
"""What checkpoints for GPT-NeoX's own training name."""
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
        handed_on = gpt_neox and NOT_READ.get(key) in HANDED_ON
        if key in NOT_READ and (not handed_on or (NOT_READ[key] == DATA and key not in TOKENIZER)):
            notes.append(f"{key} ({entry.where}) is not read: {NOT_READ[key]}")
        if key in NOT_READ and not handed_on:
            continue
        if key in ELSEWHERE:
            if entry.value is None:
                continue
            raise ConfigError(f"{key} = {entry.value!r} ({entry.where}): is not read here; {ELSEWHERE[key]} instead")
        if key == "fp16" and not gpt_neox:
            continue
        if key == "attention_config":
            _plain_attention(entry)
        elif key in ONLY and entry.value not in ONLY[key] and not _switched_off(entry.value):
            allowed = " or ".join(str(v).lower() for v in ONLY[key] if v is not None)
            raise ConfigError(f"{key} = {entry.value!r} ({entry.where}): only {allowed or 'null'} is supported here; remove the key")
        if key in known or "." in key:
            kept[key] = entry
        elif gpt_neox:
            extra[key] = entry.value
        elif key not in ONLY and key != "attention_config":
            kept[key] = entry
    return kept, extra, notes


def _switched_off(value: object) -> bool:
    """A block of DeepSpeed's that its ``enabled`` leaves out."""
    return isinstance(value, dict) and not value.get("enabled", True)


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
    result = {key: entry for key, entry in table.items() if key not in PRECISION_BLOCKS}
    blocks = {name: table[name] for name in PRECISION_BLOCKS if name in table and table[name].value is not None}
    asked = {name: precision for name, entry in blocks.items() if (precision := _precision_of(name, entry))}
    if "precision" in table and table["precision"].where == SETTING:
        asked = {}
    if "precision" in result and result["precision"].value is not None:
        asked["precision"] = result["precision"].value
    if len(set(asked.values())) > 1:
        places = ", ".join(f"{name} ({table[name].where}) asks for {precision}" for name, precision in asked.items())
        raise ConfigError(f"precision is given in ways that disagree: {places}; keep one")
    for name, precision in asked.items():
        result["precision"] = Entry(precision, table[name].where)
    if "precision" in result and result["precision"].value == "fp16" and "fp16" in blocks:
        scaling = {key: value for key, value in blocks["fp16"].value.items() if key not in ("enabled", "type", "fp16")}
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
