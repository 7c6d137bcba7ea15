"""Verdict to reward. Pure."""

from __future__ import annotations

from neox_rl.config.schema import RewardConfig
from neox_rl.types import Verdict

MAX_CHARGED_STEPS = 5
"""Wrong steps that cost something: a long babble must not drown what the other rollouts of its group say."""


def reward(verdict: Verdict, num_tokens: int, max_new_tokens: int, config: RewardConfig, num_wrong_steps: int = 0) -> float:
    """``correct - token_cost * num_tokens / max_new_tokens`` for a correct answer, ``wrong`` for any other verdict.

    ``num_tokens`` counts the completion's tokens. A correct answer never falls below ``wrong`` for its length: a length
    cost that did so would teach the policy to fail early. Right or wrong, ``wrong_step_cost`` is subtracted for each of up to
    MAX_CHARGED_STEPS steps of its search that are false (process supervision, arXiv 2305.20050, by an exact checker).
    """
    penalty = config.wrong_step_cost * min(num_wrong_steps, MAX_CHARGED_STEPS)
    if not verdict.correct:
        return config.wrong - penalty
    cost = config.token_cost * num_tokens / max(max_new_tokens, 1)
    return max(config.correct - cost, min(config.wrong, config.correct)) - penalty
