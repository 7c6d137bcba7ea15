"""DeepSpeed without its shared-memory collectives, which only its inference needs."""

from __future__ import annotations

from typing import Any

from megatron_patches.registry import Patch


def _leave_out(_: tuple[Any, ...]) -> None:
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


PATCH = Patch(
    name="deepspeed_shm",
    reason="DeepSpeed compiles a C++ op for minutes when it starts on a CPU, and two processes can wait for its lock",
    remove_when="DeepSpeed builds the op when it is first used",
    on_change="warn",
    cpu_only=True,
    sources={"deepspeed.comm.torch:build_shm_op": "2bf3cff9e3d1f058"},
    apply=_leave_out,
    upstream="deepspeed",
)
