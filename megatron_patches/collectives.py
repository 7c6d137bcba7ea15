"""Tensor-parallel layers and collectives: buffers on the CPU where there is no CUDA."""

from __future__ import annotations

from megatron_patches.cpu_code import run_on_cpu
from megatron_patches.registry import Patch

PATCH = Patch(
    name="collectives",
    reason="sequence-parallel gathers and scatters, and the tied embedding, allocate on the current CUDA device",
    remove_when="megatron-core allocates on its inputs' device",
    on_change="warn",
    cpu_only=True,
    sources={
        "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.forward": "5ee1c1ef5c5f1e5e",
        "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward": "b50b2ea4a1c90270",
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim": "44633fe36d60a51f",
        "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim": "7322068fab71d319",
        "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_last_dim": "4cb9faa13c8c5a39",
        "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer": "005bdd3315b0611b",
        "megatron.core.utils:GlobalMemoryBuffer.get_tensor": "2b843a83eb762098",
    },
    apply=run_on_cpu,
)
