"""Groups to one step's micro-batches: staleness checked, advantages and loss weights fixed, sequences packed.

    groups -> sequences (shifted to targets) -> staleness bound -> advantages x loss weights -> trees -> bins -> MicroBatch

Loss weights are final here: with D = the denominator over the whole global batch, weight(t) = mask(t) / D, and a step's loss is
the plain sum over micro-batches and ranks. Any split into micro-batches gives the same gradient.

============== ============================================= ==========================================================
aggregation    D of a token                                  source
============== ============================================= ==========================================================
token_mean     sum of masks over the batch                   DAPO (arXiv 2503.14476, section 3.3)
sequence_mean  sequences * sum of masks in its sequence      GRPO (arXiv 2402.03300, equation 3)
constant       sequences * max_new_tokens                    Dr. GRPO (arXiv 2503.20783, section 3.2): no length bias
============== ============================================= ==========================================================

D counts tokens that are masked for staleness too: masking takes gradient away and never makes the younger tokens louder.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from neox_rl.ages import NO_AGE, beyond, check_bound, count_ages, token_ages
from neox_rl.batch.advantages import group_advantages, teaches
from neox_rl.batch.microbatches import lay_out, units
from neox_rl.batch.packing import Layout, Plan, plan
from neox_rl.batch.types import BatchStats, Floats, Ints, MicroBatch, StepBatch
from neox_rl.config.schema import IMITATION, PREFERENCE, ObjectiveConfig, StalenessConfig
from neox_rl.errors import StalenessError
from neox_rl.framing import Array
from neox_rl.types import NO_VERSION, Finish, Group, Reason, Trace


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One trace as arrays of its length; entry t speaks of predicting token t + 1, and the last entry of nothing."""

    trace: Trace
    tokens: Ints
    targets: Ints
    mask: Floats
    logprobs: Floats
    versions: Ints
    credit: Floats
    """The step's own advantage, NaN where the sequence's holds."""
    weight: Floats
    advantage: float = 1.0

    @property
    def advantages(self) -> Floats:
        """[tokens], of what each entry predicts."""
        return np.where(np.isnan(self.credit), np.float32(self.advantage), self.credit)


def pack_rl(
    groups: Sequence[Group], step: int, *, staleness: StalenessConfig, objective: ObjectiveConfig, max_new_tokens: int, layout: Layout
) -> StepBatch:
    """The batch that ``step`` (1-indexed) trains on policy version ``step - 1``.

    Raises StalenessError for a ticket that comes twice, a token from a version after ``step - 1``, or, in mode strict, one
    more than S = admission_slack + delivery_slack versions before it. In both modes the packed result is checked again: no token beyond
    S has a loss weight, unless stale_tokens is truncate. Raises ValueError for a loss token that no policy
    sampled, and ConfigError for a sequence longer than ``layout.pack_tokens``. With the loss dpo the traces of a group are pairs
    (``search.preferences``), a pair with a token beyond S is masked whole, and ValueError is raised for traces that are none.
    """
    paired = objective.loss == PREFERENCE
    _check_tickets(groups)
    sequences = _sequences(groups)
    if objective.loss != IMITATION:
        _check_sampled(groups)
    ages = [_shift(token_ages(sequence.trace, step), NO_AGE) for sequence in sequences]
    bound = staleness.admission_slack + staleness.delivery_slack
    stale = [beyond(age, bound) for age in ages]
    num_stale = sum(int(old.sum()) for old in stale)
    if paired:
        _check_pairs(groups)
        stale = _whole_pairs(stale)
    if staleness.mode == "strict":
        for sequence, age in zip(sequences, ages, strict=True):
            if int(age.max(initial=0)) > bound:
                raise StalenessError(
                    f"trace {sequence.trace.id} holds a token {int(age.max())} versions old at step {step}, the bound is {bound} "
                    f"(admission_slack {staleness.admission_slack} + delivery_slack {staleness.delivery_slack}): the queue broke its rule"
                )
    weights = _loss_weights(sequences, objective.aggregation, max_new_tokens, paired)
    if staleness.stale_tokens == "mask":
        weights = [np.where(old, np.float32(0), weight) for old, weight in zip(stale, weights, strict=True)]
    advantages = [a for group in groups for a in group_advantages([t.reward for t in group.traces], objective.baseline)]
    sequences = [replace(s, weight=w, advantage=a) for s, w, a in zip(sequences, weights, advantages, strict=True)]
    layout_plan, microbatches = _packed(groups, sequences, layout, paired)
    trained = _trained_ages(microbatches, step)
    if staleness.stale_tokens == "mask":
        check_bound(trained, bound, step)
    stats = _stats(groups, sequences, layout_plan, num_stale, count_ages(ages), trained, objective.loss == IMITATION)
    return StepBatch(step, microbatches, stats)


def pack_sft(groups: Sequence[Group], step: int, *, layout: Layout) -> StepBatch:
    """Demonstrations: advantage 1, weights mask / (sum of masks), no staleness. Raises ConfigError for too long a sequence."""
    sequences = _sequences(groups)
    sequences = [replace(s, weight=w) for s, w in zip(sequences, _loss_weights(sequences, "token_mean", 0), strict=True)]
    layout_plan, microbatches = _packed(groups, sequences, layout)
    return StepBatch(step, microbatches, _stats(groups, sequences, layout_plan, 0, {}, {}, imitated=True))


def _check_sampled(groups: Sequence[Group]) -> None:
    for trace in (trace for group in groups for trace in group.traces):
        if any(s.mask > 0 and not s.logprobs and s.ids for s in trace.segments):
            raise ValueError(f"trace {trace.id} puts a loss on tokens that no policy sampled there: mask them, or train them with sft")


def _check_pairs(groups: Sequence[Group]) -> None:
    for group in groups:
        for better, worse in zip(group.traces[::2], group.traces[1::2], strict=False):
            (context, sign), (other, opposite) = map(_judged, (better, worse))
            if context != other or (sign, opposite) not in ((1, -1), (0, 0)):
                raise ValueError(f"traces {better.id} and {worse.id} are no better and worse step of one place, as the loss dpo compares")
        if len(group.traces) % 2:
            raise ValueError(f"ticket {group.ticket} has {len(group.traces)} traces: the loss dpo compares pairs of them")


def _judged(trace: Trace) -> tuple[list[int], int]:
    """The tokens before the step that has a loss, and the sign of its advantages: 0 without a loss, 2 where there is no one sign."""
    context = [i for s in itertools.takewhile(lambda s: s.mask == 0, trace.segments) for i in s.ids]
    signs = {int(np.sign(s.advantage or 0.0)) for s in trace.segments if s.mask > 0}
    return context, 2 if len(signs) > 1 or 0 in signs else next(iter(signs), 0)


def _whole_pairs(stale: Sequence[Array]) -> list[Array]:
    """A pair of which one token is too old is too old: half of a comparison compares nothing."""
    old = [bool(flags.any()) for flags in stale]
    return [np.full_like(flags, old[i] or old[i ^ 1]) for i, flags in enumerate(stale)]


def _check_tickets(groups: Sequence[Group]) -> None:
    twice = [ticket for ticket, count in Counter(group.ticket for group in groups).items() if count > 1]
    if twice:
        raise StalenessError(f"tickets {twice[:5]} come twice in one batch: the same rollouts would be trained twice")


def _sequences(groups: Sequence[Group]) -> list[_Sequence]:
    traces = [trace for group in groups for trace in group.traces]
    if not traces:
        raise ValueError(f"a batch of {len(groups)} groups without a rollout: nothing to train")
    return [_sequence(trace) for trace in traces]


def _sequence(trace: Trace) -> _Sequence:
    segments, sizes = trace.segments, [len(s.ids) for s in trace.segments]
    if not sum(sizes):
        raise ValueError(f"trace {trace.id} has no tokens")
    tokens = np.array([i for s in segments for i in s.ids], dtype=np.int64)
    logprobs = np.array([x for s in segments for x in (s.logprobs or (0.0,) * len(s.ids))], dtype=np.float32)
    versions = np.repeat(np.array([s.version for s in segments], dtype=np.int64), sizes)
    mask = np.repeat(np.array([s.mask for s in segments], dtype=np.float32), sizes)
    credit = np.repeat(np.array([np.nan if s.advantage is None else s.advantage for s in segments], dtype=np.float32), sizes)
    if len(logprobs) != len(tokens):
        raise ValueError(f"trace {trace.id} has {len(tokens)} tokens and {len(logprobs)} log-probs: a sampled segment needs one each")
    mask, versions, credit = _shift(mask, 0), _shift(versions, NO_VERSION), _shift(credit, np.nan)
    return _Sequence(trace, tokens, _shift(tokens, 0), mask, _shift(logprobs, 0), versions, credit, weight=mask)


def _shift(array: Array, end: float) -> Array:
    return np.append(array[1:], np.array([end], dtype=array.dtype))


def _loss_weights(sequences: Sequence[_Sequence], aggregation: str, max_new_tokens: int, paired: bool = False) -> list[Floats]:
    """``paired``: a search without a pair stands in the batch as two prompts, which are no sequences to take a mean over."""
    masses = [float(s.mask.sum(dtype=np.float64)) for s in sequences]
    counted = sum(mass > 0 for mass in masses) if paired else len(sequences)
    if aggregation == "token_mean":
        denominators = [sum(masses)] * len(sequences)
    elif aggregation == "sequence_mean":
        denominators = [mass * counted for mass in masses]
    else:
        denominators = [float(max_new_tokens * counted)] * len(sequences)
    # A sequence (or batch) without loss tokens has only zero masks to divide.
    pairs = zip(sequences, denominators, strict=True)
    return [(s.mask.astype(np.float64) / (denominator or 1.0)).astype(np.float32) for s, denominator in pairs]


def _packed(
    groups: Sequence[Group], sequences: Sequence[_Sequence], layout: Layout, paired: bool = False
) -> tuple[Plan, tuple[tuple[MicroBatch, ...], ...]]:
    packed = units(sequences, [len(group.traces) for group in groups], layout, paired)
    layout_plan = plan([unit.num_rows for unit in packed], layout)
    return layout_plan, lay_out(sequences, packed, layout_plan, layout.share_prefixes)


def _trained_ages(microbatches: Sequence[Sequence[MicroBatch]], step: int) -> dict[int, int]:
    """Tokens by staleness, counted where gradient is made: those with a loss weight in the packed micro-batches themselves."""
    return count_ages(step - 1 - micro.versions[micro.loss_weight != 0] for rank in microbatches for micro in rank)


def _stats(
    groups: Sequence[Group],
    sequences: Sequence[_Sequence],
    layout_plan: Plan,
    stale: int,
    staleness: Mapping[int, int],
    trained_staleness: Mapping[int, int],
    imitated: bool,
) -> BatchStats:
    rewards = np.array([s.trace.reward for s in sequences])
    masked = np.array([int((s.mask > 0).sum()) for s in sequences])
    lengths = masked - np.array([sum(len(given.ids) for given in s.trace.given if given.mask > 0) for s in sequences])
    verified = [s.trace.verdict.correct for s in sequences if s.trace.verdict.reason is not Reason.UNVERIFIED]
    loss_tokens = int(masked.sum())
    trained_tokens = sum(int((s.weight != 0).sum()) for s in sequences)
    slots = layout_plan.length * sum(len(rank) for rank in layout_plan.bins)
    num_rows = layout_plan.used
    return BatchStats(
        num_groups=len(groups),
        num_sequences=len(sequences),
        num_tokens=sum(len(s.tokens) for s in sequences),
        num_rows=num_rows,
        loss_tokens=loss_tokens,
        stale_tokens=stale,
        masked_tokens=loss_tokens - trained_tokens,
        trained_tokens=trained_tokens,
        staleness=staleness,
        trained_staleness=trained_staleness,
        reward_mean=float(rewards.mean()),
        reward_std=float(rewards.std()),
        correct_frac=float(np.mean(verified)) if verified else None,
        zero_variance_groups=sum(len(g.traces) > 1 and not teaches(g.traces, imitated) for g in groups),
        length_mean=float(lengths.mean()),
        length_max=int(lengths.max()),
        truncated_frac=float(np.mean([s.trace.finish is Finish.LENGTH for s in sequences])),
        packing_efficiency=num_rows / slots,
        reasons=Counter(s.trace.verdict.reason.value for s in sequences),
    )
