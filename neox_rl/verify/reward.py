"""Verdict to reward. Pure."""

from __future__ import annotations

from neox_rl.config.schema import RewardConfig
from neox_rl.types import Verdict


def reward(verdict: Verdict, num_tokens: int, max_new_tokens: int, config: RewardConfig) -> float:
    """``correct - token_cost * num_tokens / max_new_tokens`` for a correct answer, ``wrong`` for any other verdict.

    ``num_tokens`` counts the completion's tokens. A correct answer never falls below ``wrong``: a length cost that did
    so would teach the policy to fail early.
    """
    if not verdict.correct:
        return config.wrong
    cost = config.token_cost * num_tokens / max(max_new_tokens, 1)
    return max(config.correct - cost, min(config.wrong, config.correct))
