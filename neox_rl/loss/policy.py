"""The loss functions an engine calls, one micro-batch at a time.

    loss = sum over tokens of loss_weight * (objective + kl_coef * KL - entropy_coef * entropy)

The step's loss is the plain sum of these over micro-batches and data-parallel ranks: an engine adds gradients, it never averages.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from neox_rl.config.own import found
from neox_rl.config.schema import IMITATION, ObjectiveConfig
from neox_rl.loss.inputs import Objective, TokenArrays, TokenInputs, token_inputs
from neox_rl.loss.kl import ESTIMATORS
from neox_rl.loss.metrics import policy_sums, token_sums
from neox_rl.loss.objectives import OBJECTIVES


class LossFn(Protocol):
    """The loss of one micro-batch."""

    def __call__(self, logprobs: Tensor, entropy: Tensor, batch: TokenArrays) -> tuple[Tensor, dict[str, Tensor]]:
        """From log p(target) [T] and entropy [T]: (scalar loss with gradient, metric sums).

        Sums are 0-d fp64 tensors on the log-probs' device, without gradient; ``neox_rl.loss.metrics`` says how they are reduced.
        """
        ...


def objective(cfg: ObjectiveConfig) -> Objective:
    """The objective that ``cfg.loss`` names. Raises ConfigError."""
    return found(OBJECTIVES, cfg.loss, "metarl.objective.loss")


def needs_proximal(cfg: ObjectiveConfig) -> bool:
    """Whether the trainer must compute log-probs under the version being trained before it updates."""
    return getattr(objective(cfg), "reads_proximal", False)


def make_loss_fn(cfg: ObjectiveConfig, current_version: int) -> LossFn:
    """The policy loss of a step that trains ``current_version``."""
    per_token_loss = objective(cfg)

    def loss_fn(logprobs: Tensor, entropy: Tensor, batch: TokenArrays) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = token_inputs(logprobs, entropy, batch)
        per_token, sums = per_token_loss(inputs, cfg)
        sums |= token_sums(inputs)
        if cfg.loss != IMITATION:  # what is imitated has no behavior log-probs: nothing to compare with
            sums |= policy_sums(inputs, current_version)
        if cfg.kl_coef > 0.0:
            divergence = ESTIMATORS[cfg.kl_estimator](logprobs, inputs.reference)
            per_token = per_token + cfg.kl_coef * divergence
            sums["reference_kl/tokens"] = (divergence.detach() * inputs.trained).sum()
        if cfg.entropy_coef > 0.0:
            per_token = per_token - cfg.entropy_coef * entropy
        return _weighted(per_token, inputs, sums)

    return loss_fn


def make_sft_loss_fn() -> LossFn:
    """Negative log-likelihood of demonstrations."""
    cfg = ObjectiveConfig()

    def loss_fn(logprobs: Tensor, entropy: Tensor, batch: TokenArrays) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = token_inputs(logprobs, entropy, batch)
        per_token, sums = OBJECTIVES["sft"](inputs, cfg)
        return _weighted(per_token, inputs, token_sums(inputs) | sums)

    return loss_fn


def _weighted(per_token: Tensor, inputs: TokenInputs, sums: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    total = (inputs.loss_weight * per_token).sum()
    # One dtype, so that an engine can stack them for one reduction.
    return total, {name: value.detach().double() for name, value in {"loss": total, **sums}.items()}
