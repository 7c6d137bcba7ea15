"""Gradient buffers and optimizers: scalars on the CPU, and CPU tensors counted as trainable, where there is no CUDA."""

from __future__ import annotations

from megatron_patches.cpu_code import run_on_cpu
from megatron_patches.registry import Patch

PATCH = Patch(
    name="optimizers",
    reason="optimizers allocate scalars on CUDA and sort parameters by the string 'torch.cuda.FloatTensor'",
    remove_when="megatron-core compares dtypes and takes the device from the parameters",
    on_change="stop",
    cpu_only=True,
    sources={
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer.__init__": "6dee7ab4c9ec64c8",
        "megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.__init__": "9a3397b649b9dace",
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__": "1d470dedcf8e2f0e",
        "megatron.core.optimizer.optimizer:FP32Optimizer.__init__": "4936aab887728fbb",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__": "3275f640fc1b7377",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups": "1b9f0ec06718f817",
        "megatron.core.optimizer.clip_grads:get_grad_norm_fp32": "7fa2ba2493d43f1d",
        "megatron.core.utils:local_multi_tensor_l2_norm": "01526c55444a73bd",
        "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32": "8edb9da5365045a5",
    },
    apply=run_on_cpu,
)
