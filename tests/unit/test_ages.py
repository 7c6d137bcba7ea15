"""The age of tokens and the bound on it."""

from __future__ import annotations

import numpy as np
import pytest

from neox_rl.ages import NO_AGE, beyond, check_bound, count_ages, token_ages
from neox_rl.errors import StalenessError
from neox_rl.types import Finish, Reason, Role, Segment, Trace, Verdict


def trace(*segments: Segment) -> Trace:
    return Trace("g000000/r0", "p", segments, 1.0, Finish.STOP, Verdict(True, "1", Reason.MATCH, 0.1))


def sampled(version: int, mask: float = 1.0) -> Segment:
    return Segment((7, 7), Role.THINK, (-0.5, -0.5), version, mask)


def test_a_token_ages_with_every_step_after_the_version_that_sampled_it() -> None:
    ages = token_ages(trace(Segment((1,), Role.PROMPT), sampled(3), sampled(4, mask=0.0), sampled(6)), step=7)
    assert ages.tolist() == [NO_AGE, 3, 3, NO_AGE, NO_AGE, 0, 0]
    assert beyond(ages, 3).sum() == 0 and np.flatnonzero(beyond(ages, 2)).tolist() == [1, 2]
    assert count_ages([ages, ages]) == {0: 4, 3: 4} and count_ages([]) == {}


@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_tokens_of_a_version_yet_to_be_made_stop_the_run(mask: float) -> None:
    with pytest.raises(StalenessError, match="version 7, but version 6 is being trained: the servers hold weights of another run"):
        token_ages(trace(sampled(7, mask)), step=7)


def test_the_bound_itself_is_allowed_and_one_more_is_not() -> None:
    check_bound({0: 3, 2: 1}, bound=2, step=7)
    check_bound({}, bound=0, step=1)
    with pytest.raises(StalenessError, match=r"step 7 would train 3 of 9 tokens beyond the staleness bound S = 2 \(oldest: 3 steps\)"):
        check_bound({0: 3, 2: 3, 3: 3}, bound=2, step=7)
