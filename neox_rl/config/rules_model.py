"""Rules on the model, its parallel layout and the optimizer. Each yields one message a broken value: value, rule, fix."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import fields

from neox_rl.config.checkout import VARIABLE, find_checkout, known_keys
from neox_rl.config.machine import Machine
from neox_rl.config.run import RunConfig
from neox_rl.config.schema import MEGATRON_ENGINE, NEOX_ENGINE
from neox_rl.errors import ConfigError

VLLM_CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's CPU attention kernels are built for; any other dies when the server loads the model."""
LLAMA, QWEN2, GPT_NEOX = "llama", "qwen2", "gpt_neox"
ADAM_PARAMS = frozenset({"lr", "betas", "eps"})
LOSS_SCALE_LIMITS: dict[str, tuple[int, float]] = {
    "initial_scale_power": (0, 32),
    "hysteresis": (1, 32),
    "loss_scale_window": (1, math.inf),
    "min_loss_scale": (1, math.inf),
}
"""Integers of the block fp16. DeepSpeed never lowers a scale with hysteresis 0, and refuses others of these only at the ranks."""
LOSS_SCALING = frozenset({"loss_scale", "consecutive_hysteresis", *LOSS_SCALE_LIMITS})
ZERO_TUNING = frozenset(
    {
        "stage",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "reduce_scatter",
        "reduce_bucket_size",
        "contiguous_gradients",
        "cpu_offload",
        "round_robin_gradients",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    }
)


def model_family(config: RunConfig) -> str:
    """The HF architecture that holds this model, after its norm: ``gpt_neox``, or ``llama``, which with biases of query, key and value is
    ``qwen2``. ``one_family`` says whether it fits."""
    if config.neox.norm != "rmsnorm":
        return GPT_NEOX
    return QWEN2 if config.metarl.qkv_bias else LLAMA


def one_family(config: RunConfig, machine: Machine) -> Iterator[str]:
    """The servers load HF checkpoints, and HF knows three of the models that these keys can spell."""
    n, family = config.neox, model_family(config)
    found_and_needed: dict[str, tuple[object, object]] = {
        "activation": (n.activation, "gelu"),
        "use_bias_in_norms": (n.use_bias_in_norms, True),
        "use_bias_in_attn_linear": (n.use_bias_in_attn_linear, True),
        "use_bias_in_mlp": (n.use_bias_in_mlp, True),
        "num_kv_heads": (n.kv_heads, n.num_attention_heads),
        "metarl.qkv_bias": (config.metarl.qkv_bias, False),
    }
    name, other = "norm layernorm makes a GPTNeoXForCausalLM", "rmsnorm"
    if family != GPT_NEOX:
        found_and_needed = {
            "activation": (n.activation, "swiglu"),
            "use_bias_in_attn_linear": (n.use_bias_in_attn_linear, False),
            "use_bias_in_mlp": (n.use_bias_in_mlp, False),
            "gpt_j_residual": (n.gpt_j_residual, False),
            "rotary_pct": (n.rotary_pct, 1.0),
        }
        name, other = f"norm rmsnorm makes a {'LlamaForCausalLM' if family == LLAMA else 'Qwen2ForCausalLM'}", "layernorm"
    for key, (found, needed) in found_and_needed.items():
        if found != needed:
            yield (
                f"{key} = {_yaml(found)}: {name}, which needs {key}: {_yaml(needed)}; set it so, or choose the other family with norm:"
                f" {other}"
            )


def engine_has_the_biases(config: RunConfig, machine: Machine) -> Iterator[str]:
    """GPT-NeoX has one switch for the biases of all projections of attention, that of the output among them."""
    if config.metarl.qkv_bias and config.metarl.engine == NEOX_ENGINE:
        yield (
            "metarl.qkv_bias = true: GPT-NeoX has biases in every projection of attention or in none, so its engine has no Qwen2; set"
            f" metarl.engine: {MEGATRON_ENGINE}"
        )


def heads_divide_width(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    if n.hidden_size % n.num_attention_heads:
        low = n.hidden_size // n.num_attention_heads * n.num_attention_heads
        yield (
            f"hidden_size = {n.hidden_size}: must be a multiple of num_attention_heads = {n.num_attention_heads}; "
            f"take {low or n.num_attention_heads} or {low + n.num_attention_heads}"
        )


def head_size_served(config: RunConfig, machine: Machine) -> Iterator[str]:
    """Only servers that the run itself starts on this CPU machine are known to lack the other head sizes."""
    n, servers = config.neox, config.metarl.servers
    if config.metarl.rollout.generator != "vllm" or servers.addresses or machine.num_gpus or not config_is_local(config):
        return
    if config.metarl.debug.mode != "train_only" and n.hidden_size % n.num_attention_heads == 0 and n.head_dim not in VLLM_CPU_HEAD_DIMS:
        fits = [d for d in VLLM_CPU_HEAD_DIMS if n.hidden_size % d == 0]
        yield (
            f"hidden_size / num_attention_heads = {n.head_dim}: vLLM on CPU serves head sizes {', '.join(map(str, VLLM_CPU_HEAD_DIMS))}; "
            + (
                f"set num_attention_heads: {n.hidden_size // fits[0]} for heads of {fits[0]}"
                if fits
                else "set hidden_size to a multiple of 32"
            )
        )


def rotary_dimensions(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    if (dims := int(n.head_dim * n.rotary_pct)) < 2 or dims % 2:
        yield (
            f"rotary_pct = {n.rotary_pct}: rotates {dims} of {n.head_dim} dimensions of a head, must be an even number >= 2; "
            f"take {max(2, dims - dims % 2) / max(n.head_dim, 1):g}"
        )


def kv_heads_divide(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    if n.num_attention_heads % n.kv_heads:
        divisors = [d for d in range(1, n.num_attention_heads + 1) if n.num_attention_heads % d == 0]
        yield f"num_kv_heads = {n.num_kv_heads}: must divide num_attention_heads = {n.num_attention_heads}; take one of {divisors}"


def tensor_parallel_divides(config: RunConfig, machine: Machine) -> Iterator[str]:
    """Heads, key/value heads and MLP columns are split whole over the training TP ranks and over each server's."""
    n, servers = config.neox, config.metarl.servers
    sizes = {"num_attention_heads": n.num_attention_heads, "num_kv_heads": n.kv_heads, "the MLP width": n.mlp_width}
    for key, tp in (("model_parallel_size", n.model_parallel_size), ("metarl.servers.tensor_parallel_size", servers.tensor_parallel_size)):
        for name, size in sizes.items():
            if size % tp:
                yield f"{key} = {tp}: must divide {name} = {size}; lower {key} or change the model"


def mlp_width_whole(config: RunConfig, machine: Machine) -> Iterator[str]:
    """GPT-NeoX rounds the two projections of an MLP apart; where they disagree its model does not run."""
    n = config.neox
    size, multiple = n.intermediate_size or 4 * n.hidden_size, n.mlp_multiple_of
    out = int(size * 2 / 3) if n.activation == "swiglu" else size
    per_width = 2 if n.activation == "swiglu" else 1
    rounded = -(-out // (2 * multiple)) * 2 * multiple
    if rounded != per_width * n.mlp_width:
        fit = (3 if n.activation == "swiglu" else 2) * multiple
        yield (
            f"intermediate_size = {n.intermediate_size}: GPT-NeoX's gating and mlp_multiple_of = {multiple} give projections of {rounded}"
            f" and {n.mlp_width} columns, which do not fit; take {-(-size // fit) * fit}"
        )


def stages_hold_layers(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    if n.pipe_stages > n.num_layers:
        yield f"pipe_parallel_size = {n.pipe_parallel_size}: each stage holds a layer at least, and num_layers = {n.num_layers}; lower it"


def stages_are_even(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    if n.num_layers % n.pipe_stages:
        yield (
            f"pipe_parallel_size = {n.pipe_parallel_size}: does not divide num_layers = {n.num_layers}, so every step waits for the longest"
            " stage; change one of them"
        )


def ranks_divide(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    cell = n.model_parallel_size * n.pipe_stages
    if config_is_local(config) and n.num_gpus % cell:
        up = -(-n.num_gpus // cell) * cell
        yield (
            f"num_gpus = {n.num_gpus}: must be a multiple of model_parallel_size x pipe_parallel_size = {n.model_parallel_size} x"
            f" {n.pipe_stages}; set num_gpus: {up} (training ranks; on a CPU machine they are processes)"
        )


def sequence_parallel_needs_tp(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    if n.sequence_parallel and n.model_parallel_size == 1:
        yield (
            "sequence_parallel = true: splits the sequence over TP ranks, but model_parallel_size = 1; set model_parallel_size: 2 or"
            " sequence_parallel: false"
        )


def zero_stage(config: RunConfig, machine: Machine) -> Iterator[str]:
    """GPT-NeoX ends a run of ZeRO 2 or 3 that has its pipeline module or TP without an error."""
    n, zero = config.neox, config.neox.zero_optimization
    stage = zero.get("stage", 0)
    plain = config.metarl.engine == NEOX_ENGINE and n.pipe_parallel_size == 0 and n.model_parallel_size == 1
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        yield (
            f"zero_optimization.stage = {stage!r}: must be 0, 1 (optimizer states sharded over DP), 2 (gradients too) or 3 (parameters"
            " too); set stage: 1"
        )
    elif stage > 1 and not plain:
        yield (
            f"zero_optimization.stage = {stage}: needs metarl.engine: {NEOX_ENGINE}, pipe_parallel_size: 0 and model_parallel_size: 1, as"
            " GPT-NeoX has it with neither its pipeline module nor TP; set stage: 1"
        )
    for key in sorted(set(zero) - ZERO_TUNING):
        yield f"zero_optimization.{key}: is no key of this project; known are {', '.join(sorted(ZERO_TUNING))}; remove it"
    if zero.get("cpu_offload"):
        yield "zero_optimization.cpu_offload = true: optimizer states stay on the training device; set cpu_offload: false"


def half_precision_is_scaled(config: RunConfig, machine: Machine) -> Iterator[str]:
    """Loss scaling is DeepSpeed's, in the engine that uses it."""
    if config.neox.precision == "fp16" and config.metarl.engine != NEOX_ENGINE:
        yield f"precision = fp16: needs metarl.engine: {NEOX_ENGINE}, whose DeepSpeed scales the loss; use bfloat16 or fp32"
    block = config.extra.get("fp16") or {}
    for key in sorted(set(block) - LOSS_SCALING):
        close = difflib.get_close_matches(key, LOSS_SCALING, n=1)
        yield f"fp16.{key} = {block[key]!r}: is no key of loss scaling; " + (f"did you mean {close[0]}?" if close else "remove it")
    for key in sorted(set(block) & LOSS_SCALING):
        value, (low, high) = block[key], LOSS_SCALE_LIMITS.get(key, (0, math.inf))
        if key == "consecutive_hysteresis":
            fits, rule = isinstance(value, bool), "true or false"
        else:
            fits = _number(value) and low <= value <= high and (key == "loss_scale" or isinstance(value, int))
            kind = "a number" if key == "loss_scale" else "an integer"
            rule = f"{kind} >= {low}" if high == math.inf else f"{kind} from {low} to {high:g}"
        if not fits:
            yield f"fp16.{key} = {value!r}: must be {rule}; remove it for DeepSpeed's own"


def optimizer_known(config: RunConfig, machine: Machine) -> Iterator[str]:
    """NeoX's Adam already decouples the weight decay, so Adam and AdamW name the same update."""
    optimizer = config.neox.optimizer
    for key in sorted(set(optimizer) - {"type", "params"}):
        yield f"optimizer.{key}: is no key of an optimizer; known are type and params"
    if optimizer["type"] not in ("Adam", "AdamW"):
        yield f"optimizer.type = {optimizer['type']!r}: must be Adam or AdamW"
    params = optimizer["params"]
    if not isinstance(params, dict):
        yield f"optimizer.params = {params!r}: must be a block such as {{lr: 2.0e-4, betas: [0.9, 0.95], eps: 1.0e-8}}"
        return
    for key in sorted(set(params) - ADAM_PARAMS):
        fix = "write weight_decay at the top level" if key == "weight_decay" else "remove it"
        yield f"optimizer.params.{key} = {params[key]!r}: known are lr, betas and eps; {fix}"
    for key in ("lr", "eps"):
        if not _positive(params[key]):
            yield f"optimizer.params.{key} = {params[key]!r}: must be a number > 0; for example {'2.0e-4' if key == 'lr' else '1.0e-8'}"
    betas = params["betas"]
    if not (isinstance(betas, list) and len(betas) == 2 and all(_number(b) and 0 <= b < 1 for b in betas)):
        yield f"optimizer.params.betas = {betas!r}: must be two numbers in [0, 1); for example [0.9, 0.95]"


def decay_goes_down(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    lr = n.optimizer["params"]["lr"] if isinstance(n.optimizer["params"], dict) else 0.0
    if n.lr_decay_style != "constant" and _positive(lr) and n.min_lr > lr:
        yield f"min_lr = {n.min_lr:g}: must not be above optimizer.params.lr = {lr:g}; the schedule decays from lr to min_lr"


def positions_hold_sequence(config: RunConfig, machine: Machine) -> Iterator[str]:
    n = config.neox
    if n.max_positions < n.seq_length:
        yield (
            f"max_position_embeddings = {n.max_position_embeddings}: must be >= seq_length = {n.seq_length}; set it so, or to 0"
            " (seq_length)"
        )


def backend_fits_machine(config: RunConfig, machine: Machine) -> Iterator[str]:
    if config.neox.distributed_backend == "nccl" and not machine.num_gpus and config_is_local(config):
        yield "distributed_backend = nccl: needs CUDA GPUs, and this machine shows none; set distributed_backend: auto"


def config_is_local(config: RunConfig) -> bool:
    """Whether the training ranks run on the machine of the launcher, so that what the launcher sees holds for them."""
    return config.neox.launcher == "local" and not config.neox.hostfile


def _positive(value: object) -> bool:
    return _number(value) and value > 0  # type: ignore[operator]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def checkout_knows_the_keys(config: RunConfig, machine: Machine) -> Iterator[str]:
    """The engine ``gpt-neox`` needs the user's checkout, and hands it every key that is not one of this project."""
    if config.metarl.engine != NEOX_ENGINE:
        return
    try:
        root = find_checkout({VARIABLE: machine.gpt_neox_path})
        known = known_keys(root)
    except ConfigError as error:
        yield str(error)
        return
    for key in sorted(set(config.extra) - known):
        close = difflib.get_close_matches(key, {*known, *(f.name for f in fields(config.neox))}, n=1)
        hint = f"did you mean {close[0]}?" if close else "remove it"
        yield f"{key}: is neither a key of this project nor one of GPT-NeoX at {root}; {hint}"


def sequence_divides(config: RunConfig, machine: Machine) -> Iterator[str]:
    """Under sequence parallelism GPT-NeoX's rows are padded to a multiple of TP, and its rotary table ends at seq_length."""
    n = config.neox
    if config.metarl.engine == NEOX_ENGINE and n.sequence_parallel and n.seq_length % n.model_parallel_size:
        up = -(-n.seq_length // n.model_parallel_size) * n.model_parallel_size
        yield (
            f"seq_length = {n.seq_length}: with sequence_parallel GPT-NeoX needs a multiple of model_parallel_size ="
            f" {n.model_parallel_size}; take {up}"
        )


def attention_covers_layers(config: RunConfig, machine: Machine) -> Iterator[str]:
    """GPT-NeoX's ``[[["flash"], 12]]`` or ``[[["flash"], "all"]]``, or a name a layer; without CUDA the engine takes global throughout."""
    given, n = config.extra.get("attention_config"), config.neox
    if given is None:
        return
    fix = f'write [[["global"], {n.num_layers}]]'
    if not isinstance(given, list) or not all(isinstance(item, str) or _repeated(item) for item in given):
        yield f"attention_config = {given!r}: must be a list of [[kinds], times]; {fix}"
        return
    kinds = 0
    for item in given:
        kinds += 1 if isinstance(item, str) else len(item[0]) * (n.num_layers // len(item[0]) if item[1] == "all" else item[1])
    if kinds != n.num_layers:
        yield f"attention_config = {given!r}: names {kinds} layers, and num_layers = {n.num_layers}; {fix}"
    if "flash" in str(given) and machine.num_gpus and n.precision == "fp32":
        yield f"attention_config = {given!r}: flash attention computes in half precision, and precision = fp32; set bfloat16, or {fix}"


def _repeated(item: object) -> bool:
    """``[["flash"], 12]``."""
    match item:
        case [[str(), *_], int() | "all"]:
            return True
    return False


MODEL_RULES = (
    heads_divide_width,
    one_family,
    engine_has_the_biases,
    head_size_served,
    rotary_dimensions,
    kv_heads_divide,
    mlp_width_whole,
    tensor_parallel_divides,
    stages_hold_layers,
    ranks_divide,
    sequence_parallel_needs_tp,
    zero_stage,
    half_precision_is_scaled,
    optimizer_known,
    decay_goes_down,
    positions_hold_sequence,
    backend_fits_machine,
    checkout_knows_the_keys,
    sequence_divides,
    attention_covers_layers,
)
MODEL_WARNINGS = (stages_are_even,)
