"""Seconds to the end of a run, from what its steps and evaluations took so far."""

from __future__ import annotations

import statistics
from collections import deque

from neox_rl.config.run import RunConfig
from neox_rl.queue.wire import Phase

LAST = 20
LENGTH_FRAC = 0.5
"""Guess of a rollout's length as a share of its token budget, until RL steps are measured."""


class Pace:
    """The median of the last steps of each phase, so that one slow step (a checkpoint, an evaluation beside it) does not count."""

    def __init__(self, config: RunConfig) -> None:
        warmstart, rollout = config.metarl.warmstart, config.metarl.rollout
        self._steps = {Phase.SFT: warmstart.steps, Phase.RL: config.neox.train_iters}
        rl_tokens = LENGTH_FRAC * rollout.groups_per_step * rollout.group_size * rollout.max_new_tokens
        self._rl_cost = rl_tokens / warmstart.tokens_per_step
        self._took: dict[Phase, deque[float]] = {phase: deque(maxlen=LAST) for phase in Phase}
        self._evaluation_s = 0.0

    def step(self, phase: Phase, seconds: float) -> None:
        self._took[phase].append(seconds)

    def evaluated(self, seconds: float) -> None:
        """A full evaluation; the one at the end will take as long."""
        self._evaluation_s = seconds

    def left_s(self, phase: Phase, step: int) -> float | None:
        """From the end of ``step``; None before the first. Until RL steps are measured, they cost as much a token as the warm start's."""
        took = {p: statistics.median(times) for p, times in self._took.items() if times}
        if phase not in took:
            return None
        left = (self._steps[phase] - step) * took[phase] + self._evaluation_s
        if phase is Phase.SFT:
            left += self._steps[Phase.RL] * took.get(Phase.RL, self._rl_cost * took[phase]) + self._evaluation_s
        return max(0.0, left)
