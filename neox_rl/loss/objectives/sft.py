"""Negative log-likelihood of demonstrations: L_t = -log pi(a_t). Their loss weights are mask / (sum of masks)."""

from __future__ import annotations

from torch import Tensor

from neox_rl.config.schema import ObjectiveConfig
from neox_rl.loss.inputs import TokenInputs


def loss(inputs: TokenInputs, cfg: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor]]:
    return -inputs.logprobs, {}
