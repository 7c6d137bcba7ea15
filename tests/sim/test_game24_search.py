"""The whole Game of 24: with an exact oracle, depth-first and breadth-first search solve what can be solved and nothing else."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from neox_rl.problems.solver import rationally_solvable
from neox_rl.search.arithmetic_domain import ArithmeticDomain
from neox_rl.search.growth import Budget
from neox_rl.search.proposers import ExhaustiveProposer
from neox_rl.search.search import Search
from neox_rl.search.strategy import Options
from neox_rl.search.values import NoValue, OracleValue, Value
from neox_rl.types import End, Problem, Tree
from neox_rl.verify.verifier import ArithmeticVerifier

HANDS = list(itertools.combinations_with_replacement(range(1, 14), 4))
WHOLE = Options(width=1 << 20)


def problem(hand: tuple[int, ...]) -> Problem:
    return Problem(str(hand), "game24", "", "24", str(hand), {"numbers": list(hand), "target": 24})


def searched(strategy: str, options: Options, value: Value, hands: list[tuple[int, ...]]) -> dict[tuple[int, ...], Tree]:
    search = Search(strategy, ArithmeticDomain, options)

    async def story() -> dict[tuple[int, ...], Tree]:
        return {hand: await search.run(problem(hand), ExhaustiveProposer(), value, Budget(5000)) for hand in hands}

    return asyncio.run(story())


@pytest.mark.parametrize("strategy", ["dfs", "bfs"])
def test_with_an_oracle_all_1362_solvable_hands_are_solved_and_none_of_the_458_others(strategy: str) -> None:
    trees = searched(strategy, Options(width=WHOLE.width, prune=0.0), OracleValue(), HANDS)
    solved = {hand for hand, tree in trees.items() if tree.end is End.SOLVED}
    assert solved == {hand for hand in HANDS if rationally_solvable(hand, 24)}, "another solver, by another way"
    assert (len(solved), len(HANDS) - len(solved)) == (1362, 458)
    assert all(trees[hand].end is End.EXHAUSTED for hand in set(HANDS) - solved)
    verifier = ArithmeticVerifier()
    for hand in solved:
        tree = trees[hand]
        answer = ArithmeticDomain(problem(hand)).answer([node.text for node in tree.path(tree.answer)])
        assert verifier.check_sync(problem(hand), answer).correct, (hand, answer)


@pytest.mark.parametrize("strategy", ["dfs", "bfs"])
def test_blind_search_of_the_whole_tree_agrees(strategy: str) -> None:
    hands = HANDS[::45]
    trees = searched(strategy, WHOLE, NoValue(), hands)
    assert [trees[hand].end is End.SOLVED for hand in hands] == [rationally_solvable(hand, 24) for hand in hands]
