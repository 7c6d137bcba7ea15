"""Learning rates as pure functions of the step, with the meaning of the NeoX keys."""

from __future__ import annotations

import math

from neox_rl.config.neox import NeoXConfig
from neox_rl.config.schema import WarmstartConfig


def warmup_then(step: int, steps: int, warmup_frac: float, peak: float, floor: float, style: str) -> float:
    """Learning rate of ``step`` (1-indexed) of ``steps``: linear warm-up to ``peak``, then ``style`` down to ``floor``."""
    warmup = round(warmup_frac * steps)
    if step <= warmup:
        return peak * step / max(1, warmup)
    if style == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    shape = 1.0 - progress if style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (peak - floor) * shape


def warmstart_lr(config: WarmstartConfig, step: int) -> float:
    return warmup_then(step, config.steps, config.warmup_frac, config.lr, config.lr * config.min_lr_frac, "cosine")


def rl_lr(config: NeoXConfig, step: int) -> float:
    peak = float(config.optimizer["params"]["lr"])
    return warmup_then(step, config.train_iters, config.warmup, peak, config.min_lr, config.lr_decay_style)
