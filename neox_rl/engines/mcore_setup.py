"""From NeoX keys to megatron-core's process groups, model, gradient buffers and optimizer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.mcore_model import build_model
from neox_rl.engines.model_shape import ModelShape, stage_layers
from neox_rl.engines.rank_env import RankEnv
from neox_rl.engines.weight_parts import World
from neox_rl.engines.world import control_group, join_ranks, rank_device, topology_of
from neox_rl.errors import ConfigError


def join_world(neox: NeoXConfig, metarl: MetaRLConfig, env: RankEnv) -> World:
    """Rendezvous of all ranks and megatron-core's groups. Raises ConfigError and DeadlineError."""
    device = rank_device(env)
    join_ranks(neox, env, device, metarl.deadlines.ranks_start_s)
    minutes = metarl.deadlines.step_s / 60
    tp, pp = neox.model_parallel_size, neox.pipe_stages
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False, distributed_timeout_minutes=minutes)
    # No operation of the forward pass draws random numbers (there is no dropout), so the tracker has no streams to keep.
    initialize_rng_tracker(inference_rng_tracker=True)
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    return World(
        topology_of(neox, env, device, *ranks),
        device,
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
        control_group(metarl),
    )


def transformer_config(neox: NeoXConfig, shape: ModelShape, world: World) -> TransformerConfig:
    """megatron-core's model config. ``calculate_per_token_loss`` keeps it from dividing by micro-batches and DP ranks."""
    bf16 = neox.precision == "bfloat16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    stages = stage_layers(shape.num_layers, world.topology.pp)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm" if shape.llama else "LayerNorm",
        layernorm_epsilon=shape.norm_eps,
        activation_func=F.silu if shape.llama else F.gelu,
        gated_linear_unit=shape.llama,
        add_bias_linear=not shape.llama,
        add_qkv_bias=shape.qkv_bias,
        tensor_model_parallel_size=world.topology.tp,
        pipeline_model_parallel_size=world.topology.pp,
        sequence_parallel=neox.sequence_parallel and world.topology.tp > 1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize_grads,
        use_cpu_initialization=world.device.type == "cpu",
        init_method=_leave_undefined,
        output_layer_init_method=_leave_undefined,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        batch_p2p_sync=world.device.type == "cuda",
        num_layers_in_first_pipeline_stage=len(stages[0]) if len(stages[0]) != len(stages[-1]) else None,
    )


def _leave_undefined(_: torch.Tensor) -> None:
    """The engine fills every parameter from the layout-independent initial weights or a checkpoint."""


def _finalize_grads(model: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """megatron-core's reductions, without its division by the number of tokens: the loss weights are normalized already."""
    finalize_model_grads(model, None, **options)


def build_parts(neox: NeoXConfig, shape: ModelShape, world: World, first: bool, last: bool) -> DistributedDataParallel:
    """This rank's model inside megatron-core's gradient buffers, with undefined weights."""
    config = transformer_config(neox, shape, world)
    model = build_model(shape, config, first, last, neox.checkpoint_activations).to(world.device)
    sharded = int(neox.zero_optimization.get("stage", 0)) == 1
    return DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded), model
    )


def build_optimizer(neox: NeoXConfig, model: DistributedDataParallel) -> Any:
    """megatron-core's optimizer around torch's fused AdamW (Apex's or Transformer Engine's where installed)."""
    kind, params = str(neox.optimizer.get("type", "Adam")), neox.optimizer.get("params", {})
    if kind.lower() not in ("adam", "adamw"):
        raise ConfigError(f"optimizer type {kind!r}: the megatron-core engine has Adam and AdamW; set optimizer.type")
    beta1, beta2 = params.get("betas", (0.9, 0.999))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=float(params.get("lr", 2e-4)),
            weight_decay=float(params.get("weight_decay", neox.weight_decay)),
            adam_beta1=float(beta1),
            adam_beta2=float(beta2),
            adam_eps=float(params.get("eps", 1e-8)),
            clip_grad=neox.gradient_clipping,
            bf16=neox.precision == "bfloat16",
            params_dtype=torch.bfloat16 if neox.precision == "bfloat16" else torch.float32,
            use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
        ),
        [model],
        use_gloo_process_groups=False,
    )
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            # megatron-core leaves this product to its learning rate scheduler: without it norms and biases decay as well.
            group["weight_decay"] *= group["wd_mult"]
            if isinstance(inner, torch.optim.AdamW):
                group["fused"], group["foreach"] = True, False
    return optimizer


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside megatron-core's wrappers, in a fixed order."""
    return [chained.optimizer for chained in optimizer.chained_optimizers if chained.optimizer is not None]


def leave_world() -> None:
    """Ends the process groups; the process may build another engine afterwards."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
