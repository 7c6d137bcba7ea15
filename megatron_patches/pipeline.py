"""Pipeline schedules: their token counter and receive buffers on the CPU where there is no CUDA."""

from __future__ import annotations

from megatron_patches.cpu_code import run_on_cpu
from megatron_patches.registry import Patch

PATCH = Patch(
    name="pipeline",
    reason="the schedules and point-to-point receives allocate on the current CUDA device and synchronise it",
    remove_when="megatron-core takes the device from its model",
    on_change="warn",
    cpu_only=True,
    sources={
        "megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining": "84399467bcc06296",
        "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving": "ecf7d69308cda660",
        "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate": "a902480caa75a260",
    },
    apply=run_on_cpu,
)
