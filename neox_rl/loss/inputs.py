"""What an objective sees of one micro-batch, and the ratios it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from neox_rl.config.schema import ObjectiveConfig

MAX_LOG_RATIO = 20.0
"""Log-ratios are held in +-20: exp of more overflows to inf, and inf * 0 at a masked token would make the whole loss NaN."""

Array: TypeAlias = np.ndarray[Any, Any]


class TokenArrays(Protocol):
    """The arrays [T] of a micro-batch that a loss reads (``neox_rl.batch.types.MicroBatch`` has them)."""

    @property
    def loss_weight(self) -> Array: ...
    @property
    def advantages(self) -> Array: ...
    @property
    def behavior_logprobs(self) -> Array: ...
    @property
    def proximal_logprobs(self) -> Array: ...
    @property
    def reference_logprobs(self) -> Array: ...
    @property
    def versions(self) -> Array: ...
    @property
    def sequence_index(self) -> Array: ...


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """Tensors [T] of one micro-batch, on one device. ``logprobs`` (current policy) and ``entropy`` carry gradient, the rest none."""

    logprobs: Tensor
    entropy: Tensor
    behavior: Tensor
    proximal: Tensor
    reference: Tensor
    advantages: Tensor
    loss_weight: Tensor
    versions: Tensor
    sequence_index: Tensor

    @property
    def trained(self) -> Tensor:
        """bool [T]: tokens with weight in the loss."""
        return self.loss_weight > 0


Objective: TypeAlias = Callable[[TokenInputs, ObjectiveConfig], tuple[Tensor, dict[str, Tensor]]]
"""``(per-token loss [T] before loss_weight, metric sums)``; metric names follow ``neox_rl.loss.metrics``."""


def reads_proximal(objective: Objective) -> Objective:
    """Decorates an objective that reads ``inputs.proximal``: the trainer then computes these log-probs before each update."""
    objective.reads_proximal = True  # type: ignore[attr-defined]
    return objective


def token_inputs(logprobs: Tensor, entropy: Tensor, batch: TokenArrays) -> TokenInputs:
    def floats(array: Array) -> Tensor:
        return torch.from_numpy(array).to(logprobs)

    return TokenInputs(
        logprobs=logprobs,
        entropy=entropy,
        behavior=floats(batch.behavior_logprobs),
        proximal=floats(batch.proximal_logprobs),
        reference=floats(batch.reference_logprobs),
        advantages=floats(batch.advantages),
        loss_weight=floats(batch.loss_weight),
        versions=torch.from_numpy(batch.versions).to(logprobs.device),
        sequence_index=torch.from_numpy(batch.sequence_index).to(logprobs.device),
    )


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``exp(numerator - denominator)`` of log-probs, without overflow."""
    return (numerator - denominator).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(ratios: Tensor, advantages: Tensor, cfg: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """``(-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), where the clip took the gradient away)``."""
    plain = ratios * advantages
    held = ratios.clamp(1.0 - cfg.clip_low, 1.0 + cfg.clip_high) * advantages
    return -torch.minimum(plain, held), held < plain


def share(flags: Tensor, inputs: TokenInputs) -> Tensor:
    """Number of trained tokens with the flag set: the sum behind a ``.../tokens`` metric."""
    return (flags & inputs.trained).sum().detach()
