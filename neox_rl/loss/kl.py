"""Per-token estimators of KL(current || reference) from tokens of the current policy (Schulman 2020, "Approximating KL divergence").

With d = log pi_current - log pi_reference at the sampled token:

====  ====================  =============================  ==================================================================
name  value                 gradient used                  its expectation
====  ====================  =============================  ==================================================================
k1    d                     d * grad log pi                grad KL(current || reference). Differentiating d itself would give
                                                           grad log pi, of expectation zero: no penalty at all
k2    d^2 / 2               d * grad log pi                grad KL(current || reference); the value is biased
k3    exp(-d) - 1 + d       (1 - exp(-d)) * grad log pi    grad KL(reference || current), the other direction; the value is
                                                           unbiased and never negative (GRPO, arXiv 2402.03300, equation 4)
====  ====================  =============================  ==================================================================

Tokens of a stale policy are not reweighted here: the expectations hold for fresh ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neox_rl.loss.inputs import MAX_LOG_RATIO


def k1(current: Tensor, reference: Tensor) -> Tensor:
    squared = k2(current, reference)
    return squared + ((current - reference) - squared).detach()


def k2(current: Tensor, reference: Tensor) -> Tensor:
    return (current - reference).square() / 2


def k3(current: Tensor, reference: Tensor) -> Tensor:
    gap = current - reference
    # expm1: exp(-d) - 1 + d in fp32 would be rounding noise for the small d that a KL penalty aims at.
    return torch.expm1((-gap).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + gap


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
