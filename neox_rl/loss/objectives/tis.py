"""Truncated importance sampling (Ionides 2008; the rho-bar of IMPALA, arXiv 1802.01561, section 4.1), per token:

    L_t = -stop_gradient(min(r_t, ratio_cap)) A_t log pi_current(a_t),    r_t = pi_current / pi_behavior

Every token keeps its gradient. The correction is per token, not of the whole prefix: first order in the policies' difference.
"""

from __future__ import annotations

from torch import Tensor

from neox_rl.config.schema import ObjectiveConfig
from neox_rl.loss.inputs import TokenInputs, ratio, share


def loss(inputs: TokenInputs, cfg: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    weight = ratio(inputs.logprobs.detach(), inputs.behavior)
    per_token = -weight.clamp(max=cfg.ratio_cap) * inputs.advantages * inputs.logprobs
    return per_token, {"truncated_frac/tokens": share(weight > cfg.ratio_cap, inputs)}
