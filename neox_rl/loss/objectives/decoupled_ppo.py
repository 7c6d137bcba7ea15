"""Decoupled PPO of AReaL (arXiv 2505.24298, section 5.2, after arXiv 2110.00641):

    L_t = -w_t min(u_t A_t, clip(u_t, 1 - clip_low, 1 + clip_high) A_t)
    u_t = pi_current / pi_proximal,    w_t = stop_gradient(min(pi_proximal / pi_behavior, ratio_cap))

The clip is anchored at the proximal policy (the trainer's own at the start of the step) and not at the stale behavior policy.
``ratio_cap`` is not in the paper's equation: w is truncated here because its variance grows with staleness.
"""

from __future__ import annotations

from torch import Tensor

from neox_rl.config.schema import ObjectiveConfig
from neox_rl.loss.inputs import TokenInputs, clipped_surrogate, ratio, reads_proximal, share


@reads_proximal
def loss(inputs: TokenInputs, cfg: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    surrogate, clipped = clipped_surrogate(ratio(inputs.logprobs, inputs.proximal), inputs.advantages, cfg)
    weight = ratio(inputs.proximal, inputs.behavior)
    sums = {"clip_frac/tokens": share(clipped, inputs), "truncated_frac/tokens": share(weight > cfg.ratio_cap, inputs)}
    return weight.clamp(max=cfg.ratio_cap) * surrogate, sums
