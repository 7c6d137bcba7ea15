"""What a trainer engine eats: packed micro-batches, one tuple of them a data-parallel rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]

PADDING = -1
"""``sequence_index`` of the padding at the end of a micro-batch."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences laid end to end. Every array but ``cu_seqlens`` has length T; entry t speaks of predicting ``targets[t]``.

    ``targets[t]`` is the next token of the same sequence; at a sequence's last token it is 0 with weight 0. Sequence i is
    ``cu_seqlens[i]:cu_seqlens[i + 1]``; padding comes last, as sequences no longer than the step's longest. ``loss_weight``
    has the aggregation's denominator in it, so a step's loss is the plain sum of ``loss_weight * per_token_loss`` over every
    micro-batch of every rank.

    Two sequences [5, 6, 7] and [8, 9], prompts of one token, padded to T = 8::

        tokens          5 6 7 | 8 9 | 0 0 0        cu_seqlens  0 3 5 8
        targets         6 7 0 | 9 0 | 0 0 0        max_seqlen  3
        positions       0 1 2 | 0 1 | 0 1 2
        sequence_index  0 0 0 | 1 1 | -1 -1 -1

    ``behavior_logprobs`` and ``versions`` are of the policy that sampled the target (0.0 and NO_VERSION where none did);
    ``advantages`` are constant over a sequence, but for segments with an advantage of their own. ``proximal_logprobs`` and
    ``reference_logprobs`` are copies of the behavior's until replaced.
    """

    tokens: Ints
    targets: Ints
    positions: Ints
    cu_seqlens: NDArray[np.int32]
    loss_weight: Floats
    advantages: Floats
    behavior_logprobs: Floats
    proximal_logprobs: Floats
    reference_logprobs: Floats
    versions: Ints
    sequence_index: Ints
    max_seqlen: int

    def __len__(self) -> int:
        return len(self.tokens)

    def with_logprobs(self, *, proximal: Floats | None = None, reference: Floats | None = None) -> MicroBatch:
        """The same micro-batch with the log-probs [T] of its targets under the proximal or the reference policy."""
        for name, array in (("proximal", proximal), ("reference", reference)):
            if array is not None and array.shape != self.tokens.shape:
                raise ValueError(f"{name} log-probs have shape {array.shape}, the micro-batch has {self.tokens.shape}")
        return dataclasses.replace(
            self,
            proximal_logprobs=self.proximal_logprobs if proximal is None else proximal.astype(np.float32),
            reference_logprobs=self.reference_logprobs if reference is None else reference.astype(np.float32),
        )


@dataclass(frozen=True, slots=True)
class BatchStats:
    """Counts over the global batch. A loss token is one with mask > 0 that has a token before it to be predicted from."""

    num_groups: int
    num_sequences: int
    num_tokens: int
    loss_tokens: int
    stale_tokens: int
    """Loss tokens older than the bound, whether masked or kept with a truncated ratio."""
    masked_tokens: int
    trained_tokens: int
    """Those with a loss weight: loss_tokens - masked_tokens."""
    staleness: Mapping[int, int]
    """Histogram over loss tokens, before masking: {staleness in optimizer steps: tokens}. Empty for demonstrations."""
    trained_staleness: Mapping[int, int]
    """The same over the tokens with a loss weight in the packed micro-batches. Empty for demonstrations."""
    reward_mean: float
    reward_std: float
    correct_frac: float
    zero_variance_groups: int
    """Groups of several rollouts with equal rewards: they teach nothing under a group baseline."""
    length_mean: float
    """Completion length: loss tokens a sequence."""
    length_max: int
    truncated_frac: float
    """Share of sequences that ended for their token budget."""
    packing_efficiency: float
    """num_tokens over all slots of all micro-batches, in (0, 1]."""
    reasons: Mapping[str, int]
    """What the verifier found: {reason: sequences}."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step: ``microbatches[d]`` is what data-parallel rank d trains, as many and as long on every rank."""

    step: int
    microbatches: tuple[tuple[MicroBatch, ...], ...]
    stats: BatchStats
