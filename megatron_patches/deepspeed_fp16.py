"""DeepSpeed's fp16 on CPUs without instructions for it."""

from __future__ import annotations

import functools
from typing import Any

from megatron_patches.registry import Patch


def _allow(_: tuple[Any, ...]) -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    @functools.wraps(CPU_Accelerator.is_fp16_supported)  # the source that the digest is taken of stays the wrapped one's
    def is_fp16_supported(self: Any) -> bool:
        return True

    CPU_Accelerator.is_fp16_supported = is_fp16_supported


PATCH = Patch(
    name="deepspeed_fp16",
    reason="DeepSpeed refuses fp16 where the CPU has no instructions for it; torch computes it all the same, slowly",
    remove_when="DeepSpeed leaves it to torch",
    on_change="warn",
    cpu_only=True,
    sources={"deepspeed.accelerator.cpu_accelerator:CPU_Accelerator.is_fp16_supported": "5f9f840c9be9b947"},
    apply=_allow,
    upstream="deepspeed",
)
