"""DPO (arXiv 2305.18290, equation 7) of single steps (Step-DPO, arXiv 2406.18629, equation 2), one loss a pair:

    L = -log sigmoid(beta (log pi(w | c) / pi_ref(w | c) - log pi(l | c) / pi_ref(l | c)))

for a better step w and a worse step l that were sampled in the same place c. pi_ref is the policy that RL began with, not the one that
sampled the pair: against that one the bracket would be 0 at every update, and nothing would hold the policy. Sequences 2i and 2i + 1 are
pair i, and ``batch.pack`` keeps them in one micro-batch, so the two sums meet here. Each trained token of a pair has its L: the tokens'
weights add up to 1 / number of pairs (``aggregation: sequence_mean``), so the step's loss is the mean of L. A pair that is too old to be
trained is counted, like any masked token; a search that gave no pair is not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from neox_rl.config.schema import ObjectiveConfig
from neox_rl.loss.inputs import TokenInputs


def loss(inputs: TokenInputs, cfg: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    pairs, pair = torch.unique(inputs.sequence_index.div(2, rounding_mode="floor"), return_inverse=True)
    mask, sign = inputs.trained.to(inputs.logprobs), 1 - 2 * (inputs.sequence_index % 2)
    sums = inputs.logprobs.new_zeros(2, len(pairs))
    sums = sums.index_add(1, pair, torch.stack([sign * mask * (inputs.logprobs - inputs.reference), mask]))
    margins, trained = cfg.beta * sums[0], (sums[1] > 0).detach()
    return -logsigmoid(margins)[pair], {
        "pairs": trained.sum(),
        "preferred_frac/pairs": ((margins > 0) & trained).sum(),
        "preferred_margin/pairs": (margins * trained).sum().detach(),
    }
