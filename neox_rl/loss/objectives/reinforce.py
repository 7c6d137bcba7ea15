"""REINFORCE (Williams 1992): L_t = -A_t log pi(a_t).

No importance ratio: the gradient is the policy gradient only of tokens that the trained version itself sampled (staleness 0).
"""

from __future__ import annotations

from torch import Tensor

from neox_rl.config.schema import ObjectiveConfig
from neox_rl.loss.inputs import TokenInputs


def loss(inputs: TokenInputs, cfg: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.advantages * inputs.logprobs, {}
