"""What a rollout of several episodes is worth, and what of that each episode is credited with. Equations of arXiv 2501.04682.

The KL term of (15) is no part of the reward here: ``metarl.objective.kl_coef`` puts it into the loss, for every method of rollout, and
its gradient is that of (15) with ``kl_estimator`` k1 or k2 alone (``loss.kl``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum

from neox_rl.metacot import TAGS


class Objective(StrEnum):
    """Over the rewards r_1..r_K of the episodes of one rollout."""

    SUM = "sum"  # RL^2 (13): the sum; tends to collapse to greedy behavior
    FINAL = "final"  # E-RL^2 (14): the last alone, so that earlier ones may explore
    ANY = "any"  # the best
    FIRST = "first"  # plain RL: one attempt


SOLVED_IN: Mapping[Objective, str] = {
    Objective.SUM: "one of the episodes",
    Objective.FINAL: "the last episode",
    Objective.ANY: "one of the episodes",
    Objective.FIRST: "the first episode",
}
"""In which episode a rollout must be right to count as right. See ``solved``."""


def tags_of(gammas: Sequence[float]) -> Mapping[float, str]:
    """The prompt tag of each discount, the smaller the more in haste; a single one has none. Raises ValueError for more than TAGS."""
    ordered = sorted(set(gammas))
    if len(ordered) > len(TAGS):
        raise ValueError(f"{len(ordered)} discounts, and {len(TAGS)} prompt tags: {', '.join(TAGS)}")
    if len(ordered) == 1:
        return {ordered[0]: ""}
    return dict(zip(ordered, (*TAGS[: len(ordered) - 1], TAGS[-1]), strict=True))


def tagged(prompt: str, tag: str) -> str:
    """The prompt with the tag as its last line."""
    return f"{prompt.rstrip()}\n{tag}\n" if tag else prompt


def total(rewards: Sequence[float], objective: Objective) -> float:
    """The objective's value; 0 for a rollout without an episode."""
    if not rewards:
        return 0.0
    match objective:
        case Objective.SUM:
            return sum(rewards)
        case Objective.FINAL:
            return rewards[-1]
        case Objective.ANY:
            return max(rewards)
        case Objective.FIRST:
            return rewards[0]


def solved(right: Sequence[bool], objective: Objective) -> bool:
    """Whether a rollout with such episodes is right: where one of them alone has the reward, that one; else any of them."""
    match objective:
        case Objective.FINAL:
            return any(right[-1:])
        case Objective.FIRST:
            return any(right[:1])
    return any(right)


def credits(rewards: Sequence[float], objective: Objective) -> tuple[float, ...]:
    """What the tokens of each episode could still bring about: one number an episode, the first that of ``total``.

    ``sum``: the rewards from there on. ``final``: the last reward. ``any``: how far the best from there on exceeds the best before.
    ``first``: nothing after the first.
    """
    match objective:
        case Objective.SUM:
            return tuple(reversed(list(itertools.accumulate(reversed(rewards)))))
        case Objective.FINAL:
            return (rewards[-1],) * len(rewards) if rewards else ()
        case Objective.ANY:
            before = list(itertools.accumulate(rewards, max))
            return tuple(max(0.0, max(rewards[i:]) - before[i - 1]) if i else max(rewards) for i in range(len(rewards)))
        case Objective.FIRST:
            return tuple(r if i == 0 else 0.0 for i, r in enumerate(rewards))


def discounted(reward: float, num_search_tokens: int, gamma: float) -> float:
    """(21): gamma^|Z| r. With gamma < 1 a search is worth its length only up to a point. Raises ValueError for gamma outside (0, 1]."""
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma {gamma} must be in (0, 1]: it shrinks the reward with every token of search")
    return gamma**num_search_tokens * reward


def qstar_reward(solution_logprobs: Sequence[float], without_search: Sequence[float] = ()) -> float:
    """(18)-(20): log pi(S | Z, q) of a given solution S after the search Z, with no verifier; less log pi(S | q) where that is given.

    With the second term a search earns what it adds to the solution's likelihood.
    """
    if without_search and len(without_search) != len(solution_logprobs):
        raise ValueError(f"{len(solution_logprobs)} log-probs of the solution after the search, {len(without_search)} without it")
    return math.fsum(solution_logprobs) - math.fsum(without_search)
