"""GPT-NeoX's process groups, model and DeepSpeed engine, put together from the checkout's own parts.

Imported once the patches are applied: from then on ``megatron`` is the checkout's package.
"""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Mapping
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from megatron import mpu
from megatron.initialize import _initialize_distributed, _set_random_seed
from megatron.model.utils import get_params_for_weight_decay_optimization
from megatron.mpu import RowParallelLinear
from megatron.neox_arguments import NeoXArgs
from megatron.training import get_learning_rate_scheduler, get_model
from torch import Tensor

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.schema import MetaRLConfig
from neox_rl.engines.deepspeed_files import PatientFiles
from neox_rl.engines.gpt_neox_args import COMPILED, KERNELS, neox_arguments
from neox_rl.engines.model_shape import ModelShape
from neox_rl.engines.rank_env import RankEnv
from neox_rl.engines.weight_parts import World
from neox_rl.engines.world import backend_of, control_group, join_ranks, rank_device, topology_of

logger = logging.getLogger(__name__)
_CHECKED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
    "tokenizer_type",
    "model_parallel_size",
)
_MPU_STATE = (
    "_MODEL_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP",
    "_PIPE_PARALLEL_GROUP",
    "_IO_PARALLEL_GROUP",
    "_MPU_WORLD_SIZE",
    "_MPU_RANK",
    "_MPU_TOPOLOGY",
    "_FP32_ALLREDUCE",
)


def join_world(neox: NeoXConfig, metarl: MetaRLConfig, shape: ModelShape, env: RankEnv, extra: Mapping[str, Any]) -> tuple[World, Any]:
    """Rendezvous of all ranks, and GPT-NeoX's groups; the world and its NeoXArgs. Raises ConfigError and DeadlineError."""
    device = rank_device(env)
    backend = backend_of(neox, device)
    # GPT-NeoX and DeepSpeed make groups that take the deadline of the world's.
    join_ranks(neox, env, device, max(metarl.deadlines.ranks_start_s, metarl.deadlines.step_s))
    cuda = device.type == "cuda"
    built = all(importlib.util.find_spec(name) is not None for name in KERNELS)
    if cuda and not built and env.rank == 0 and (asked := [key for key in COMPILED if extra.get(key)]):
        logger.warning("GPT-NeoX's own kernels are not installed: %s off, and torch computes the same", ", ".join(asked))
    arguments = neox_arguments(
        neox, extra, world_size=env.world_size, padded_vocab=shape.padded_vocab, backend=backend, cuda=cuda, built=built
    )
    args = NeoXArgs.from_dict(arguments)
    args.rank, args.local_rank, args.world_size = env.rank, env.local_rank if device.index is None else device.index, env.world_size
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    _initialize_distributed(neox_args=args)
    _set_random_seed(args.seed)
    top = topology_of(neox, env, device, mpu.get_model_parallel_rank(), mpu.get_pipe_parallel_rank(), mpu.get_data_parallel_rank())
    groups = mpu.get_model_parallel_group(), mpu.get_pipe_parallel_group(), mpu.get_data_parallel_group()
    return World(top, device, *groups, control_group(metarl)), args


def build_engine(args: Any) -> tuple[Any, PatientFiles | None]:
    """The model in DeepSpeed's engine, with an optimizer that decays what GPT-NeoX decays; and what its checkpoints are written by."""
    model = get_model(neox_args=args)
    groups = get_params_for_weight_decay_optimization(model, args)
    for group in groups:
        for parameter in group["params"]:
            parameter.model_parallel = getattr(parameter, "model_parallel", False)
    params = args.optimizer["params"]
    optimizer = torch.optim.AdamW(
        groups, lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"], weight_decay=args.weight_decay, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        args=args,
        lr_scheduler=get_learning_rate_scheduler(optimizer=optimizer, neox_args=args),
        dist_init_required=False,
        mpu=None if args.is_pipe_parallel else mpu,
    )
    if args.is_pipe_parallel:
        engine.set_has_attention_mask(True)
        # Between stages DeepSpeed sends each TP rank's share of activations that it takes for equal; under sequence parallelism
        # they are not, and a model of other numbers is trained without a word.
        engine.is_pipe_partitioned = engine.is_grad_partitioned = False
    _complete_gradients(engine.module, args)
    return engine, PatientFiles.put_into(engine)


def _complete_gradients(model: torch.nn.Module, args: Any) -> None:
    """Makes the gradients of parameters that every tensor-parallel rank holds the whole ones.

    Under sequence parallelism a norm, or a bias added to a part of the sequence, sees that part alone. GPT-NeoX sums them itself, but
    leaves out the biases and sums those of the last norm twice; so its hooks are not used. With a parallel residual every rank adds
    the biases of both sublayers before the sum over ranks: the first rank's are trained, the others' stay where they are.
    """
    if args.model_parallel_size == 1:
        return
    group, first = mpu.get_model_parallel_group(), mpu.get_model_parallel_rank() == 0

    def summed(grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total, group=group)
        return total

    for module in model.modules():
        own = list(module.parameters(recurse=False)) if "norm" in type(module).__name__.lower() else []
        if isinstance(module, RowParallelLinear) and module.bias is not None:
            if module.parallel_output:
                if not first:
                    module.bias.register_hook(torch.zeros_like)
                continue
            own = [module.bias]
        for parameter in own if args.sequence_parallel else []:
            parameter.register_hook(summed)


def gathered(parameter: Tensor) -> Any:
    """Under ZeRO 3: the parameter whole while the context is open; what the first data-parallel rank wrote into it stays."""
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def leave_world() -> None:
    """Ends the process groups; the process may build another engine afterwards."""
    for name in _MPU_STATE:
        setattr(mpu.initialize, name, None)
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None


def client_state(args: Any, iteration: int) -> dict[str, Any]:
    """The entries of a checkpoint that GPT-NeoX checks and restores: iteration, sizes, random state."""
    cuda = torch.cuda.is_available()
    return {
        "iteration": iteration,
        "args": {name: getattr(args, name) for name in _CHECKED},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state() if cuda else torch.get_rng_state(),
        "rng_tracker_states": mpu.get_cuda_rng_tracker().get_states(),
    }


def differences(saved: Mapping[str, Any], args: Any) -> list[str]:
    """What a checkpoint's ``args`` entry says otherwise than these arguments; its tokenizer is the run's own affair."""
    checked = [name for name in _CHECKED if name != "tokenizer_type" and name in saved]
    return [f"{name} {saved[name]!r} there, {getattr(args, name)!r} here" for name in checked if saved[name] != getattr(args, name)]
