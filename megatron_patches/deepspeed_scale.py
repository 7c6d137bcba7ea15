"""DeepSpeed's dynamic loss scale, grown behind the optimizer step instead of within it."""

from __future__ import annotations

import functools
from typing import Any

from megatron_patches.registry import Patch


def _grow_after(optimizer: type[Any]) -> None:
    """An overflow lowers the scale where DeepSpeed has it: such a step updates nothing."""
    step, update = optimizer.step, optimizer._update_scale

    @functools.wraps(update)
    def lower(self: Any, has_overflow: bool = False) -> None:
        if has_overflow:
            update(self, True)

    @functools.wraps(step)
    def step_then_grow(self: Any, closure: Any = None) -> None:
        step(self, closure)
        if not self.overflow:
            update(self, False)

    optimizer._update_scale, optimizer.step = lower, step_then_grow


def _apply(_: tuple[Any, ...]) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        _grow_after(optimizer)


PATCH = Patch(
    name="deepspeed_scale",
    reason="DeepSpeed grows the loss scale before it divides the gradients by it: in such a step they count half",
    remove_when="DeepSpeed divides by the scale that the loss was multiplied by",
    on_change="stop",
    cpu_only=False,
    sources={
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.step": "9520884fd916d178",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._update_scale": "456ef78f7cbaa909",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.step": "89aab0f80f1a80b3",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._loss_scale_update_and_overflow_cleanup": "9e13a11b6993d41b",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._update_scale": "456ef78f7cbaa909",
        "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler.update_scale": "0aa6d6d665708226",
    },
    apply=_apply,
    upstream="deepspeed",
)
