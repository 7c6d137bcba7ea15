"""How old a token is when it is trained, and how old it may be: the one place of this rule, for training and for simulation.

Step s trains v(s-1); a token that v sampled is then (s-1) - v optimizer steps old. No token older than S = admission_slack +
delivery_slack gets gradient, unless the config keeps such tokens with a truncated ratio.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from neox_rl.errors import StalenessError
from neox_rl.types import NO_VERSION, Trace

NO_AGE = -1
"""Of a token without a loss, or that no policy sampled."""


def token_ages(trace: Trace, step: int) -> NDArray[np.int64]:
    """Staleness [num_tokens] of a trace's loss tokens at ``step``, NO_AGE for its other tokens.

    Raises StalenessError for a version that step ``step`` cannot have seen.
    """
    newest = max((s.version for s in trace.segments), default=NO_VERSION)
    if newest > step - 1:
        raise StalenessError(
            f"trace {trace.id} holds a token of version {newest}, but version {step - 1} is being trained: "
            f"the servers hold weights of another run or of a later checkpoint"
        )
    ages = [step - 1 - s.version if s.version != NO_VERSION and s.mask > 0 else NO_AGE for s in trace.segments]
    return np.repeat(np.array(ages, dtype=np.int64), [len(s.ids) for s in trace.segments])


def beyond(ages: NDArray[np.int64], bound: int) -> NDArray[np.bool_]:
    """Which tokens are too old to get gradient."""
    return ages > bound


def count_ages(ages: Iterable[NDArray[np.int64]]) -> dict[int, int]:
    """Loss tokens by staleness, youngest first."""
    values, counts = np.unique(np.concatenate([np.empty(0, np.int64), *ages]), return_counts=True)
    return {int(age): int(count) for age, count in zip(values, counts, strict=True) if age != NO_AGE}


def check_bound(trained: dict[int, int], bound: int, step: int) -> None:
    """Raises StalenessError where a token beyond the bound would get gradient. ``trained``: such tokens by staleness."""
    count = sum(tokens for age, tokens in trained.items() if age > bound)
    if count:
        raise StalenessError(
            f"step {step} would train {count} of {sum(trained.values())} tokens beyond the staleness bound S = {bound} "
            f"(oldest: {max(trained)} steps): the queue broke its rule, or stale tokens were not masked"
        )
