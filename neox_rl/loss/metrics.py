"""Metrics of a step: how they are summed over micro-batches and ranks, and what they say.

Convention. A loss function gives scalars by name, the same names for every micro-batch (zeros where it has no tokens):

- ``<name>/<count>``: a sum; the metric is it over the sum called ``<count>`` (``entropy/tokens`` over ``tokens``);
- ``<name>_max``: reduced by maximum, never negative;
- anything else: reduced by summation and reported as it is (``loss``, ``tokens``).

So an engine adds up everything, takes the maximum of what ``is_max`` says, over micro-batches and over data-parallel ranks, and
``finalize`` makes the report of it:

==================  ============================================================================================  ========
metric              meaning, over trained tokens                                                                  expected
==================  ============================================================================================  ========
tokens              trained tokens
fresh_tokens        those whose version is the one being trained
mismatch_kl         k3 of trainer against engine, fresh tokens only: numerics, not staleness                      0
mismatch_logp       mean |log pi_trainer - log pi_engine|, fresh tokens only; mismatch_logp_max the largest       0
ratio               mean importance ratio current / behavior                                                      1
behavior_kl         k3 of KL(behavior || current), all versions: staleness and numerics together                  small
ess                 effective sample size (sum r)^2 / (n sum r^2), a share                                        near 1
entropy             of the current policy, nats a token
clip_frac           tokens whose gradient the clip took
truncated_frac      tokens whose ratio was truncated
reference_kl        the configured estimator of KL(current || reference), when kl_coef > 0
pairs               dpo: trained pairs of steps
preferred_frac      dpo: pairs whose better step the policy raised above the worse one, against the reference     above 0.5
preferred_margin    dpo: beta times the difference of the pair's log-ratios                                       above 0
==================  ============================================================================================  ========
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from neox_rl.loss.inputs import MAX_LOG_RATIO, TokenInputs, ratio


def is_max(name: str) -> bool:
    """Whether a metric is reduced by maximum and not by summation."""
    return name.endswith("_max")


def finalize(sums: Mapping[str, float]) -> dict[str, float]:
    """Means from the sums of a whole step. A mean over no tokens is left out: there is nothing to report."""
    report: dict[str, float] = {}
    for name, value in sums.items():
        metric, _, count = name.partition("/")
        if not count:
            report[name] = value
        elif sums[count] > 0:
            report[metric] = value / sums[count]
    square = report.pop("ratio_square", 0.0)
    if square > 0.0:
        report["ess"] = report["ratio"] ** 2 / square
    return report


@torch.no_grad()
def token_sums(inputs: TokenInputs) -> dict[str, Tensor]:
    """Sums that every loss reports."""
    trained = inputs.trained
    return {"tokens": trained.sum(), "entropy/tokens": _total(inputs.entropy, trained)}


@torch.no_grad()
def policy_sums(inputs: TokenInputs, current_version: int) -> dict[str, Tensor]:
    """Sums of the importance ratio current / behavior; ``current_version`` is the version being trained."""
    trained = inputs.trained
    fresh = trained & (inputs.versions == current_version)
    gap = inputs.logprobs - inputs.behavior
    ratios = ratio(inputs.logprobs, inputs.behavior)
    # expm1, because the mismatch to be seen is of the order of fp32 rounding, which exp(x) - 1 would lose.
    behavior_kl = torch.expm1(gap.double().clamp(max=MAX_LOG_RATIO)) - gap.double()
    return {
        "fresh_tokens": fresh.sum(),
        "mismatch_kl/fresh_tokens": _total(behavior_kl, fresh),
        "mismatch_logp/fresh_tokens": _total(gap.abs(), fresh),
        "mismatch_logp_max": torch.where(fresh, gap.abs(), 0).amax(),
        "ratio/tokens": _total(ratios, trained),
        "ratio_square/tokens": _total(ratios.square(), trained),
        "behavior_kl/tokens": _total(behavior_kl, trained),
    }


def _total(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum(dtype=torch.float64)
