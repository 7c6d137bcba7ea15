"""Attention on x86 CPUs with cache blocks of 16 tokens, inside each vLLM process whose environment asks for them.

vLLM's attention kernels for CPUs take blocks of any multiple of 16 (``_get_attn_isa`` chooses them by the size of a block), but what the
backend declares is multiples of 32, and the check of a block's size goes by that. Upstream, vllm 0.32:
``vllm/v1/attention/backends/cpu_attn.py``, ``CPUAttentionBackend.get_supported_kernel_block_sizes``; to be removed when it says 16.
"""

from __future__ import annotations

from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend


class SmallBlockAttention(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's own, with what its kernels can do declared."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[MultipleOf]:
        return [MultipleOf(16)]
