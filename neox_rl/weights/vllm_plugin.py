"""Entry point ``neox_rl`` of the group ``vllm.general_plugins``: what stock vLLM is told of this project."""

from __future__ import annotations

import os

BACKEND = "zmq"
SMALL_BLOCKS = "NEOX_RL_SMALL_BLOCKS"
"""In the environment of CPU servers that take cache blocks of 16 tokens. Any other server beside this package stays as it is."""


def register() -> None:
    """Called by vLLM in each of its processes, sometimes twice in one. What is registered is imported only where it is used."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "neox_rl.weights.vllm_engine", "ZmqWeightTransferEngine")
    if SMALL_BLOCKS in os.environ:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CPU_ATTN, "neox_rl.rollout.vllm_blocks.SmallBlockAttention")
