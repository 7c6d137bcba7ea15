"""Game of 24: reach 24 with four numbers of 1..13 (or three). Problems are those with a solution in integer steps."""

from __future__ import annotations

from dataclasses import replace

from neox_rl.arithmetic import reachable
from neox_rl.config.schema import ProblemsConfig
from neox_rl.errors import ConfigError
from neox_rl.problems.countdown import arithmetic_problem, multisets
from neox_rl.problems.solver import rationally_solvable
from neox_rl.problems.split import ProblemSet, split_by_cluster

TARGET = 24
MAX_CARD = 13


def game24(cfg: ProblemsConfig, seed: int) -> ProblemSet:
    """One problem a multiset of 1..max_number that reaches 24 through integers within 0..max_value.

    Fewer than the exact solver's (``neox_rl.problems.solver``): 1,3,4,6 needs 6 / (1 - 3/4), which has no integer
    step. ``counts["beyond_integer_steps"]`` is the number of such hands. Raises ConfigError.
    """
    if cfg.num_numbers not in (3, 4):
        raise ConfigError(f"num_numbers {cfg.num_numbers}: Game of 24 is played with 4 numbers, or 3; set problems.num_numbers")
    if cfg.max_number > MAX_CARD:
        raise ConfigError(f"max_number {cfg.max_number}: Game of 24 has cards 1..{MAX_CARD}; set problems.max_number")
    if cfg.max_value < TARGET:
        raise ConfigError(f"max_value {cfg.max_value}: no step may reach {TARGET}; set problems.max_value to at least {TARGET}")
    hands = multisets(cfg.num_numbers, cfg.max_number, seed)
    solvable = [hand for hand in hands if TARGET in reachable(hand, cfg.max_value)]
    problems = [arithmetic_problem("game24", hand, TARGET, cfg.max_value) for hand in solvable]
    problem_set = split_by_cluster(problems, cfg.heldout_frac, seed)
    beyond = sum(rationally_solvable(hand, TARGET) for hand in hands) - len(solvable)
    return replace(problem_set, counts={**problem_set.counts, "beyond_integer_steps": beyond})
