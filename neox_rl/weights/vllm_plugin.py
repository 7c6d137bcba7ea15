"""Entry point ``neox_rl`` of the group ``vllm.general_plugins``: registers the transfer engine with stock vLLM."""

from __future__ import annotations

BACKEND = "zmq"


def register() -> None:
    """Called by vLLM in each of its processes, sometimes twice in one. The engine itself is imported only where it is made."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "neox_rl.weights.vllm_engine", "ZmqWeightTransferEngine")
