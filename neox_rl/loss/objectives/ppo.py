"""PPO's clipped surrogate (arXiv 1707.06347, equation 7), asymmetric clip of DAPO (arXiv 2503.14476, equation 10):

    L_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t),    r_t = pi_current / pi_behavior

``clip_high`` above ``clip_low`` lets unlikely good tokens grow (clip-higher). With one update a step and fresh tokens r is 1 and the
clip is idle; with stale tokens it takes the gradient of those that already moved far enough.
"""

from __future__ import annotations

from torch import Tensor

from neox_rl.config.schema import ObjectiveConfig
from neox_rl.loss.inputs import TokenInputs, clipped_surrogate, ratio, share


def loss(inputs: TokenInputs, cfg: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    per_token, clipped = clipped_surrogate(ratio(inputs.logprobs, inputs.behavior), inputs.advantages, cfg)
    return per_token, {"clip_frac/tokens": share(clipped, inputs)}
