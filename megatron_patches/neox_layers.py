"""GPT-NeoX's layers, attention and start-up: buffers on the CPU where there is no CUDA."""

from __future__ import annotations

from megatron_patches.cpu_code import run_on_cpu
from megatron_patches.registry import Patch

PATCH = Patch(
    name="neox_layers",
    reason="parallel layers, attention scores, sequence-parallel buffers and the start-up allocate on, or count, CUDA devices",
    remove_when="GPT-NeoX takes the device from its inputs",
    on_change="warn",
    cpu_only=True,
    sources={
        "megatron.initialize:_initialize_distributed": "e3f50f4d1447dbc4",
        "megatron.initialize:_set_random_seed": "9a3f62e0345714da",
        "megatron.mpu.layers:VocabParallelEmbedding.__init__": "a5e8ae38ca3a9dab",
        "megatron.mpu.layers:ColumnParallelLinear.__init__": "dfbdced0f73be122",
        "megatron.mpu.layers:RowParallelLinear.__init__": "a81042914137a0ef",
        "megatron.mpu.mappings:_gather_along_seq_dim": "e913009300bd6e50",
        "megatron.mpu.mappings:_reduce_scatter_along_seq_dim": "ab4e4bebb89950cc",
        "megatron.model.transformer:ParallelSelfAttention.attention": "b5474479756cbbbd",
    },
    apply=run_on_cpu,
    upstream="gpt-neox",
)
