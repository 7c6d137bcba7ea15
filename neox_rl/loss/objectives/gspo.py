"""GSPO (arXiv 2507.18071, equations 5 to 7): one ratio a sequence, clipped as a whole,

    L_t = -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A),    s = exp(mean over the sequence of log(pi_current / pi_behavior))

for every trained token t of the sequence. With ``aggregation: sequence_mean`` the sum is the paper's objective. The mean is over
trained tokens, so tokens masked for staleness have no part in s. Sequence ratios lie far closer to 1 than token ratios: the paper
clips at 3e-4 and 4e-4, where ``clip_low`` and ``clip_high`` default to token-sized values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neox_rl.config.schema import ObjectiveConfig
from neox_rl.loss.inputs import TokenInputs, clipped_surrogate, ratio, share


def loss(inputs: TokenInputs, cfg: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    indices, sequence = torch.unique(inputs.sequence_index, return_inverse=True)
    mask = inputs.trained.to(inputs.logprobs)
    sums = inputs.logprobs.new_zeros(2, len(indices))
    sums = sums.index_add(1, sequence, torch.stack([(inputs.logprobs - inputs.behavior) * mask, mask]))
    mean = sums[0] / sums[1].clamp(min=1.0)
    ratios = ratio(mean, torch.zeros_like(mean))[sequence]
    per_token, clipped = clipped_surrogate(ratios, inputs.advantages, cfg)
    return per_token, {"clip_frac/tokens": share(clipped, inputs)}
