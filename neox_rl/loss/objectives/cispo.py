"""CISPO of MiniMax-M1 (arXiv 2506.13585, equations 4 and 5):

    L_t = -stop_gradient(clip(r_t, 1 - clip_low, ratio_cap)) A_t log pi_current(a_t),    r_t = pi_current / pi_behavior

The weight is clipped, the gradient never: rare tokens that a PPO clip would silence (the "wait" of a reflection) keep teaching.
``ratio_cap`` is the paper's 1 + eps_high. The paper sets no lower bound in its runs: that is ``clip_low: 1``, and then it is tis.
"""

from __future__ import annotations

from torch import Tensor

from neox_rl.config.schema import ObjectiveConfig
from neox_rl.loss.inputs import TokenInputs, ratio, share


def loss(inputs: TokenInputs, cfg: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    weight = ratio(inputs.logprobs.detach(), inputs.behavior)
    held = weight.clamp(1.0 - cfg.clip_low, cfg.ratio_cap)
    return -held * inputs.advantages * inputs.logprobs, {"truncated_frac/tokens": share(held != weight, inputs)}
