"""The rules of the arithmetic games, exact and pure: what the problem generator, the search and its analysis agree on.

A state is a sorted tuple of non-negative ints. A step takes two of its numbers, the larger first, and puts their
result back: ``a + b``, ``a - b`` (never negative), ``a * b``, ``a / b`` (exact, ``b`` > 0), each result within
``0..max_value``. Two steps that lead to the same state are one step. A state of one number is a leaf. These are the
rules of Stream of Search (arXiv 2404.03683), with its bound on intermediate values as a parameter.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from neox_rl.metacot import OPERATORS, Step

State: TypeAlias = tuple[int, ...]
CACHED_STATES = 1 << 17
ARITHMETIC_TASKS = frozenset({"countdown", "game24"})
"""Tasks whose problems have ``numbers``, ``target`` and ``max_value`` in their ``meta``."""


class Move(NamedTuple):
    """A legal step and the state after it."""

    step: Step
    after: State


def state_of(numbers: Sequence[int]) -> State:
    return tuple(sorted(numbers))


def compute(left: int, operator: str, right: int) -> int | None:
    """``left operator right`` as an exact non-negative int, None where there is none."""
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right if left >= right else None
        case "*":
            return left * right
        case "/":
            return left // right if right > 0 and left % right == 0 else None
        case _:
            raise ValueError(f"operator {operator!r} is none of {OPERATORS}")


def without(state: State, left: int, right: int) -> State | None:
    """The state less two of its numbers, None when it does not hold both."""
    rest = list(state)
    for number in (left, right):
        if number not in rest:
            return None
        rest.remove(number)
    return tuple(rest)


@lru_cache(CACHED_STATES)
def legal_moves(state: State, max_value: int) -> tuple[Move, ...]:
    """Every legal step from ``state``, one per resulting state, in a fixed order.

    Empty exactly at a leaf: the larger number less the smaller is always legal.
    """
    moves: dict[State, Move] = {}
    for low, high in itertools.combinations(range(len(state)), 2):
        right, left = state[low], state[high]
        rest = state[:low] + state[low + 1 : high] + state[high + 1 :]
        for operator in OPERATORS:
            result = compute(left, operator, right)
            if result is not None and result <= max_value:
                after = state_of((*rest, result))
                moves.setdefault(after, Move(Step(left, operator, right, result), after))
    return tuple(moves.values())


@lru_cache(CACHED_STATES)
def reachable(state: State, max_value: int) -> frozenset[int]:
    """Every value that some sequence of legal steps makes of all the numbers: one call gives all targets of a multiset.

    By splits of the multiset instead of step orders, so six numbers take milliseconds.
    """
    if len(state) == 1:
        return frozenset(state)
    values: set[int] = set()
    for left, right in splits(state):
        for a, b in itertools.product(reachable(left, max_value), reachable(right, max_value)):
            high, low = (a, b) if a >= b else (b, a)
            values.update(v for op in OPERATORS if (v := compute(high, op, low)) is not None and v <= max_value)
    return frozenset(values)


def splits(state: State) -> Iterator[tuple[State, State]]:
    """Every way to part the numbers into two non-empty multisets, each unordered pair once or more; the first number stays left."""
    rest = range(1, len(state))
    for size in range(1, len(state)):
        for chosen in itertools.combinations(rest, size):
            yield tuple(state[i] for i in range(len(state)) if i not in chosen), tuple(state[i] for i in chosen)


def solvable(state: State, target: int, max_value: int) -> bool:
    return target in reachable(state, max_value)


def solutions(state: State, target: int, max_value: int) -> Iterator[tuple[Step, ...]]:
    """Every sequence of legal steps from ``state`` to ``target`` alone, in the order of ``legal_moves``."""
    if len(state) == 1:
        if state[0] == target:
            yield ()
        return
    for step, after in legal_moves(state, max_value):
        if solvable(after, target, max_value):
            for rest in solutions(after, target, max_value):
                yield (step, *rest)


def expression(numbers: Sequence[int], steps: Sequence[Step]) -> str:
    """The steps as one expression over ``numbers``, words separated by spaces: ``( 7 * 3 ) + 5``.

    Raises ValueError when a step takes a number that is not there, or a number is left over.
    """
    parts = [(n, str(n)) for n in numbers]
    for step in steps:
        texts = []
        for operand in (step.left, step.right):
            index = next((i for i, (value, _) in enumerate(parts) if value == operand), None)
            if index is None:
                raise ValueError(f"step {step} takes {operand}, which is not among {[v for v, _ in parts]}")
            texts.append(parts.pop(index)[1])
        parts.append((step.result, f"( {texts[0]} {step.operator} {texts[1]} )"))
    if len(parts) != 1:
        raise ValueError(f"{len(parts)} numbers are left after {len(steps)} steps; an expression uses every number")
    text = parts[0][1]
    return text[2:-2] if text.startswith("( ") else text
