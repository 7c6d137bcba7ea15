"""Goal finding, the task of the meta-RL figure of arXiv 2501.04682: one of N doors hides the goal; K episodes, one guess each.

A policy without memory finds it in k episodes with chance 1 - (1 - 1/N)^k; one that remembers its wrong guesses with k/N.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from neox_rl.episodes.protocol import Outcome
from neox_rl.errors import ConfigError
from neox_rl.types import Problem

TASK = "goal_finding"


def memoryless_success(num_goals: int, episodes: int) -> float:
    """The chance that guesses drawn afresh each time have found the goal after ``episodes`` of them."""
    return 1.0 - (1.0 - 1.0 / num_goals) ** episodes


def meta_success(num_goals: int, episodes: int) -> float:
    """The chance that guesses without repetition have found it."""
    return min(1.0, episodes / num_goals)


def goal_problems(num_goals: int, seed: int) -> Iterator[Problem]:
    """Endless problems, the goal even among 1..``num_goals``; problem number i depends on ``(num_goals, seed, i)`` alone."""
    if num_goals < 1:
        raise ConfigError(f"num_goals {num_goals} must be at least 1: there is a goal")
    number = 0
    while True:
        goal = random.Random(f"goal/{num_goals}/{seed}/{number}").randint(1, num_goals)
        prompt = f"One of the doors 1 to {num_goals} hides the goal. Name a door.\n"
        yield Problem(f"{TASK}/{num_goals}/{seed}/{number}", TASK, prompt, str(goal), str(number), {"num_goals": num_goals})
        number += 1


class GoalFinding:
    """``protocol.Environment``: right when the episode's last word is the goal's number. States have no names: nothing is left behind."""

    def __init__(self, problem: Problem) -> None:
        self._goal = problem.answer

    def reset(self, state: str | None) -> None:
        """Every episode begins alike."""

    async def step(self, text: str) -> Outcome:
        words = text.split()
        guess = words[-1].strip(".:,") if words else ""
        correct = guess == self._goal
        return Outcome(float(correct), correct, "The goal is there." if correct else f"The goal is not behind door {guess[:9]}.")
