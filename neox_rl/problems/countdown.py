"""Countdown: reach a target with every given number used once. Every generated problem is solvable within the rules."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from neox_rl.arithmetic import State, reachable
from neox_rl.config.schema import ProblemsConfig
from neox_rl.errors import ConfigError
from neox_rl.metacot import prompt_text
from neox_rl.problems.split import ProblemSet, split_by_cluster
from neox_rl.types import Problem

MAX_MULTISETS = 5_000
"""Most multisets that are enumerated; beyond it, that many are drawn by seed (4 numbers to 100 have 4.4 million)."""


def countdown(cfg: ProblemsConfig, seed: int) -> ProblemSet:
    """Every solvable (multiset, target), targets 1..max_target, split by multiset. Raises ConfigError on rules that clash."""
    if max(cfg.max_target, cfg.max_number) > cfg.max_value:
        raise ConfigError(
            f"max_target {cfg.max_target} and max_number {cfg.max_number} must be at most max_value {cfg.max_value}: "
            "every value of a problem has one word in the tokenizer; raise problems.max_value"
        )
    problems: list[Problem] = []
    for numbers in multisets(cfg.num_numbers, cfg.max_number, seed):
        targets = sorted(t for t in reachable(numbers, cfg.max_value) if 1 <= t <= cfg.max_target)
        problems.extend(arithmetic_problem("countdown", numbers, target, cfg.max_value) for target in targets)
    return split_by_cluster(problems, cfg.heldout_frac, seed)


def multisets(size: int, max_number: int, seed: int) -> list[State]:
    """All multisets of ``size`` numbers in 1..max_number, sorted; a seeded sample of MAX_MULTISETS where there are more."""
    if math.comb(max_number + size - 1, size) <= MAX_MULTISETS:
        return list(itertools.combinations_with_replacement(range(1, max_number + 1), size))
    rng = random.Random(f"multisets/{seed}")
    drawn: set[State] = set()
    while len(drawn) < MAX_MULTISETS:
        drawn.add(tuple(sorted(rng.randint(1, max_number) for _ in range(size))))
    return sorted(drawn)


def arithmetic_problem(task: str, numbers: Sequence[int], target: int, max_value: int) -> Problem:
    """The problem in the words of ``neox_rl.metacot``; its answer is the target, checked by evaluating an expression."""
    cluster = ",".join(map(str, numbers))
    return Problem(
        id=f"{task}/{cluster}->{target}",
        task=task,
        # In the order of the multiset a small model learns multisets by heart instead of the numbers; the order is the problem's own.
        prompt=prompt_text(random.Random(f"{task}/{cluster}->{target}").sample(numbers, len(numbers)), target),
        answer=str(target),
        cluster=cluster,
        meta={"numbers": list(numbers), "target": target, "max_value": max_value},
    )
