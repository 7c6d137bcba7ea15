"""Depth-first search with an exact comparison at the leaves: the search that demonstrations show.

Also the tree without a search, one solution path, and what a depth-first search costs on average (exactly).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias, cast

from neox_rl.arithmetic import Move, State, legal_moves, solutions, solvable, state_of
from neox_rl.metacot import Step, step_text
from neox_rl.types import NO_NODE, End, Node, Problem, Reason, Tree, Verdict

Order: TypeAlias = Callable[[Sequence[Move], int, random.Random], Sequence[Move]]
"""(moves, target, rng) -> the moves in the order they are tried."""


def uniform(moves: Sequence[Move], target: int, rng: random.Random) -> Sequence[Move]:
    """Every order equally likely."""
    return rng.sample(moves, len(moves))


def nearest(moves: Sequence[Move], target: int, rng: random.Random) -> Sequence[Move]:
    """Results close to the target first, ties at random: the common heuristic of Stream of Search (arXiv 2404.03683)."""
    return sorted(rng.sample(moves, len(moves)), key=lambda move: abs(move.step.result - target))


ORDERS: Mapping[str, Order] = {"uniform": uniform, "nearest": nearest}


@dataclass(frozen=True, slots=True)
class Strategy:
    """How a depth-first searcher goes about it: the order of inner steps, the order of leaves, and how many leaves of a state it tries.

    With ``leaf_order=nearest`` no width loses the goal: a leaf that reaches it is the nearest.
    """

    order: Order = uniform
    leaf_order: Order = uniform
    leaf_width: int = 1 << 30


EXHAUSTIVE = Strategy()
"""Random order, every leaf: what a searcher without any idea of the target does."""
MIXED: Mapping[Strategy, int] = {
    EXHAUSTIVE: 4,
    Strategy(nearest, nearest): 2,
    Strategy(uniform, nearest, leaf_width=1): 2,
    Strategy(nearest, nearest, leaf_width=1): 1,
}
"""Searchers of mixed quality and how often each is met, as in Stream of Search (arXiv 2404.03683, section 4): the better, the rarer."""


def rules(problem: Problem) -> tuple[State, int, int]:
    """``(state, target, max_value)`` of an arithmetic problem, from its ``meta``."""
    return (
        state_of(cast("list[int]", problem.meta["numbers"])),
        cast("int", problem.meta["target"]),
        cast("int", problem.meta["max_value"]),
    )


def dfs(problem: Problem, rng: random.Random, strategy: Strategy = EXHAUSTIVE, max_nodes: int | None = None) -> Tree:
    """Search as ``strategy`` does until the first goal, until everything was tried, or until ``max_nodes`` steps were taken.

    Node 0 is the root with an empty text; every other node is one step, leaves with the verdict of the comparison.
    Nodes are numbered in the order of their expansion.
    """
    root, target, max_value = rules(problem)
    nodes = [new_node(0, -1, "")]

    def moves_from(state: State) -> Iterator[Move]:
        moves = legal_moves(state, max_value)
        if len(state) > 2:
            return iter(strategy.order(moves, target, rng))
        return iter(strategy.leaf_order(moves, target, rng)[: strategy.leaf_width])

    stack = [(0, moves_from(root))]
    while stack and (max_nodes is None or len(nodes) <= max_nodes):
        parent, moves = stack[-1]
        move = next(moves, None)
        if move is None:
            stack.pop()
            continue
        leaf = len(move.after) == 1
        nodes.append(step_node(len(nodes), parent, move.step, target if leaf else None))
        if not leaf:
            stack.append((nodes[-1].id, moves_from(move.after)))
        elif move.step.result == target:
            break
    return new_tree(problem.id, tuple(nodes))


def solution_path(problem: Problem, rng: random.Random) -> Tree:
    """One of the problem's solutions, each equally likely, as a tree without dead ends. Raises ValueError when there is none."""
    root, target, max_value = rules(problem)
    found = all_solutions(root, target, max_value)
    if not found:
        raise ValueError(f"problem {problem.id} has no solution within 0..{max_value}")
    nodes = [new_node(0, -1, "")]
    steps = rng.choice(found)
    for i, step in enumerate(steps):
        nodes.append(step_node(i + 1, i, step, target if i == len(steps) - 1 else None))
    return new_tree(problem.id, tuple(nodes))


def with_wrong_steps(tree: Tree, problem: Problem) -> Tree:
    """The first solution in ``tree``, with every legal step beside each of its own that cannot be won: wrong steps that no searcher need
    have tried. A search holds one beside fewer than two thirds of its right steps, since it often finds the way at once."""
    state, target, max_value = rules(problem)
    nodes, parent = [new_node(0, NO_NODE, "")], 0
    for right in tree.path(tree.answer):
        after = state
        moves = legal_moves(state, max_value)
        for move in moves:
            text, leaf = _text(move.step), len(move.after) == 1
            if text == right.text:
                after = move.after
            elif not solvable(move.after, target, max_value):
                nodes.append(step_node(len(nodes), parent, move.step, target if leaf else None))
        nodes.append(replace(right, id=len(nodes), parent=parent, order=len(nodes)))
        parent, state = len(nodes) - 1, after
    return new_tree(problem.id, tuple(nodes))


def new_node(id: int, parent: int, text: str, verdict: Verdict | None = None) -> Node:
    return Node(id, parent, text, order=id, verdict=verdict)


def step_node(id: int, parent: int, step: Step, target: int | None) -> Node:
    """The node of a step; a leaf, compared with ``target`` unless that is None."""
    verdict = None if target is None else leaf_verdict(str(step.result), step.result == target)
    return new_node(id, parent, _text(step), verdict)


@lru_cache(1 << 14)
def leaf_verdict(result: str, correct: bool) -> Verdict:
    return Verdict(correct, result, Reason.MATCH if correct else Reason.MISMATCH, 0.0)


def new_tree(problem_id: str, nodes: tuple[Node, ...]) -> Tree:
    """A tree as its nodes tell it: solved by the first right end among them, else without an answer."""
    goal = next((n.id for n in nodes if n.verdict is not None and n.verdict.correct), NO_NODE)
    return Tree(problem_id, nodes, End.EXHAUSTED if goal == NO_NODE else End.SOLVED, goal)


@lru_cache(1 << 16)
def _text(step: Step) -> str:
    return step_text(step)


@lru_cache(1 << 14)
def all_solutions(state: State, target: int, max_value: int) -> tuple[tuple[Step, ...], ...]:
    return tuple(solutions(state, target, max_value))


@lru_cache(1 << 17)
def tree_size(state: State, max_value: int) -> int:
    """Number of steps in the whole search tree below ``state``."""
    return sum(1 + tree_size(after, max_value) for _, after in legal_moves(state, max_value))


@lru_cache(1 << 17)
def expected_nodes(state: State, target: int, max_value: int) -> float:
    """Mean number of steps until the first goal of a depth-first search in uniformly random order. 0 at a goal.

    With m children that hold a goal, the first of them is any one with equal chance, and a child that holds none
    comes before all m, and is searched whole, with chance 1 / (m + 1). Raises ValueError when there is no goal.
    """
    if state == (target,):
        return 0.0
    after = [move.after for move in legal_moves(state, max_value)]
    good = [s for s in after if solvable(s, target, max_value)]
    if not good:
        raise ValueError(f"target {target} is not reachable from {state} within 0..{max_value}")
    wasted = sum(1 + tree_size(s, max_value) for s in after if not solvable(s, target, max_value)) / (len(good) + 1)
    return wasted + sum(1 + expected_nodes(s, target, max_value) for s in good) / len(good)
