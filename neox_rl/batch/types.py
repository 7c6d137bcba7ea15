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
    """Sequences, or prefix trees of them, laid end to end in T rows; Q predictions that are made at rows; N loss terms of predictions.

    ``tokens`` and ``positions`` [T]: tree i is ``cu_seqlens[i]:cu_seqlens[i + 1]``, its rows depth first, ``positions`` their depth (see
    ``neox_rl.batch.prefixes``; a sequence is the tree that does not branch). ``rows`` and ``targets`` [Q]: prediction q is of
    ``targets[q]`` after row ``rows[q]``. ``terms`` [N]: the prediction that each loss term is taken of; the arrays below have one entry a
    term. Without shared prefixes T = Q = N, ``rows`` and ``terms`` count up, and ``targets[t]`` is the next token of the same sequence, at
    its last token 0 with weight 0. With them, terms without a weight are left out.

    ``loss_weight`` has the aggregation's denominator in it, so a step's loss is the plain sum of ``loss_weight * per_term_loss`` over
    every micro-batch of every rank. Padding comes last, as sequences no longer than the step's longest.

    Two sequences [5, 6, 7] and [5, 9] of one group, prompts of one token, padded to T = 8, laid out alone and as a tree::

        tokens          5 6 7 | 5 9 | 0 0 0        5 6 7 9 | 0 0 0 | 0
        positions       0 1 2 | 0 1 | 0 1 2        0 1 2 1 | 0 1 2 | 0
        cu_seqlens      0 3 5 8                    0 4 7 8
        rows            0 1 2   3 4   5 6 7        0 1 0
        targets         6 7 0   9 0   0 0 0        6 7 9
        terms           0 1 2   3 4   5 6 7        0 1 2
        sequence_index  0 0 0   1 1  -1 -1 -1      0 0 1

    ``behavior_logprobs`` and ``versions`` are of the policy that sampled the target (0.0 and NO_VERSION where none did);
    ``advantages`` are constant over a sequence, but for segments with an advantage of their own. ``proximal_logprobs`` and
    ``reference_logprobs`` are copies of the behavior's until replaced. ``max_seqlen`` is the length of the longest path.
    """

    tokens: Ints
    positions: Ints
    cu_seqlens: NDArray[np.int32]
    rows: Ints
    targets: Ints
    terms: Ints
    loss_weight: Floats
    advantages: Floats
    behavior_logprobs: Floats
    proximal_logprobs: Floats
    reference_logprobs: Floats
    versions: Ints
    sequence_index: Ints
    max_seqlen: int

    @property
    def shared(self) -> bool:
        """Whether it was laid out with shared prefixes: no root is predicted then, so there are fewer predictions than rows."""
        return len(self.rows) < len(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def with_logprobs(self, *, proximal: Floats | None = None, reference: Floats | None = None) -> MicroBatch:
        """The same micro-batch with the log-probs [N] of its terms under the proximal or the reference policy."""
        for name, array in (("proximal", proximal), ("reference", reference)):
            if array is not None and array.shape != self.terms.shape:
                raise ValueError(f"{name} log-probs have shape {array.shape}, the terms of the micro-batch {self.terms.shape}")
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
    num_rows: int
    """Tokens that the model computes: num_tokens, or fewer where prefixes are shared."""
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
    correct_frac: float | None
    """None where nobody verified."""
    zero_variance_groups: int
    """Groups of several traces that teach nothing (``advantages.teaches``): equal rewards under a group baseline, steps without credit."""
    length_mean: float
    """Completion length: loss tokens a sequence, a given solution left out."""
    length_max: int
    truncated_frac: float
    """Share of sequences that ended for their token budget."""
    packing_efficiency: float
    """num_rows over all slots of all micro-batches, in (0, 1]."""
    reasons: Mapping[str, int]
    """What the verifier found: {reason: sequences}."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One optimizer step: ``microbatches[d]`` is what data-parallel rank d trains, as many and as long on every rank."""

    step: int
    microbatches: tuple[tuple[MicroBatch, ...], ...]
    stats: BatchStats
