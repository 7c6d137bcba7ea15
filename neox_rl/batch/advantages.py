"""Advantages: a rollout's reward against a baseline from the other rollouts of its group. Pure.

=====  ==============================  ==========================================================================
name   advantage of rollout i of G     source
=====  ==============================  ==========================================================================
none   r_i                             REINFORCE (Williams 1992), no baseline
mean   r_i - mean(r)                   Dr. GRPO (arXiv 2503.20783, section 3.2), with ``aggregation: constant``
rloo   r_i - mean of the other r_j     leave-one-out (arXiv 2402.14740, equation 9): mean * G / (G - 1), unbiased
grpo   (r_i - mean(r)) / std(r)        GRPO (arXiv 2402.03300, section 4.1.2), population standard deviation
=====  ==============================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from neox_rl.framing import Array
from neox_rl.types import Trace


def _none(rewards: Array) -> Array:
    return rewards


def _mean(rewards: Array) -> Array:
    centered: Array = rewards - rewards.mean()
    return centered


def _rloo(rewards: Array) -> Array:
    return _mean(rewards) * (len(rewards) / (len(rewards) - 1))


def _grpo(rewards: Array) -> Array:
    return _mean(rewards) / float(rewards.std())


BASELINES: dict[str, Callable[[Array], Array]] = {"none": _none, "mean": _mean, "rloo": _rloo, "grpo": _grpo}


def zero_variance(rewards: Sequence[float]) -> bool:
    """Whether all rewards of a group are equal: nothing to compare, a single rollout included."""
    return min(rewards) == max(rewards)


def teaches(traces: Sequence[Trace], imitated: bool = False) -> bool:
    """A group of equal rewards teaches nothing under a group baseline (DAPO, arXiv 2503.14476, section 3.2), unless its steps have credit
    of their own. ``imitated``: by whatever has a loss, all of it right; the rewards are not compared."""
    trained = [s for trace in traces for s in trace.segments if s.mask > 0]
    if imitated or not trained:
        return bool(trained)
    credit = [s.advantage for s in trained if s.advantage is not None]
    return any(credit) if credit else len({trace.reward for trace in traces}) > 1


def group_advantages(rewards: Sequence[float], baseline: str) -> tuple[float, ...]:
    """One advantage a rollout of one group. Raises ValueError for an empty group or a reward that is not finite.

    A group without variance gets exactly 0 under every baseline but ``none``: rounding in the mean would otherwise be
    blown up to +-1 by the standard deviation, and a group of one has no other rollout to leave in.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"rewards {list(rewards)} of a group: at least one is needed, all finite")
    if baseline != "none" and zero_variance(rewards):
        return (0.0,) * len(rewards)
    return tuple(BASELINES[baseline](values).tolist())
