"""Goal finding, the task of the meta-RL figure of arXiv 2501.04682: one of N doors hides the goal; K episodes, one guess each.

A policy without memory finds it in k episodes with chance 1 - (1 - 1/N)^k; one that remembers its wrong guesses with k/N.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from neox_rl.config.schema import ProblemsConfig
from neox_rl.metacot import goal_prompt
from neox_rl.problems.split import ProblemSet, split_by_cluster
from neox_rl.types import Problem

TASK = "goal_finding"
NUM_PROBLEMS = 4096
"""All look alike; what differs is where the goal is."""


def memoryless_success(num_goals: int, episodes: int) -> float:
    """The chance that guesses drawn afresh each time have found the goal after ``episodes`` of them."""
    return 1.0 - (1.0 - 1.0 / num_goals) ** episodes


def meta_success(num_goals: int, episodes: int) -> float:
    """The chance that guesses without repetition have found it."""
    return min(1.0, episodes / num_goals)


def goal_finding(cfg: ProblemsConfig, seed: int) -> ProblemSet:
    """NUM_PROBLEMS problems, the goal even among 1..``cfg.num_goals``; number i depends on ``(cfg.num_goals, seed, i)`` alone.

    Held out, every door has its turn: where one had more problems, a policy that only names that one would look better than 1/N.
    """
    parted = split_by_cluster([goal_problem(cfg.num_goals, seed, i) for i in range(NUM_PROBLEMS)], cfg.heldout_frac, seed)
    return replace(parted, heldout=_doors_in_turn(parted.heldout), heldout_ordered=True)


def _doors_in_turn(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """Of the first n as many behind each door, to within one, until a door has no more."""
    doors: dict[str, list[Problem]] = {}
    for problem in sorted(problems, key=lambda p: int(p.answer)):
        doors.setdefault(problem.answer, []).append(problem)
    return tuple(problem for turn in zip_longest(*doors.values()) for problem in turn if problem is not None)


def goal_problem(num_goals: int, seed: int, number: int) -> Problem:
    goal = random.Random(f"goal/{num_goals}/{seed}/{number}").randint(1, num_goals)
    name = f"{TASK}/{num_goals}/{seed}/{number}"
    return Problem(name, TASK, goal_prompt(num_goals), str(goal), str(number), {"num_goals": num_goals})
