"""The rules of the arithmetic games: legal steps, reachable targets, solutions, expressions."""

from __future__ import annotations

import ast
import itertools
import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neox_rl.arithmetic import State, compute, expression, legal_moves, reachable, solutions, state_of
from neox_rl.metacot import Step

MAX_VALUE = 60
states = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(state_of)
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(int() as value):
            return Fraction(value)
        case ast.BinOp(left, op, right):
            return Fraction(OPERATIONS[type(op)](evaluate(left), evaluate(right)))
    raise AssertionError(ast.dump(node))


def by_steps(state: State) -> set[int]:
    """Reachable values the slow way: every order of steps."""
    return {state[0]} if len(state) == 1 else set().union(*(by_steps(move.after) for move in legal_moves(state, MAX_VALUE)))


def test_steps_put_the_larger_number_first_and_stay_exact_and_in_range() -> None:
    assert [move.step for move in legal_moves((3, 6), MAX_VALUE)] == [
        Step(6, "+", 3, 9),
        Step(6, "-", 3, 3),
        Step(6, "*", 3, 18),
        Step(6, "/", 3, 2),
    ]
    assert [move.step.operator for move in legal_moves((4, 7), 11)] == ["+", "-"], "28 is beyond 11, 7 / 4 is not exact"
    assert all(move.step.operator != "/" for move in legal_moves((0, 0), MAX_VALUE)), "nothing is divided by zero"


def test_steps_to_the_same_state_are_one_step() -> None:
    assert [move.after for move in legal_moves((1, 5), MAX_VALUE)] == [(6,), (4,), (5,)], "5 * 1 and 5 / 1 are the same"
    assert len(legal_moves((2, 2, 2), MAX_VALUE)) == 3, "4, 0, 1: the three pairs are one, 2 + 2 is 2 * 2"


@given(states)
def test_every_move_is_what_it_says(state: State) -> None:
    moves = legal_moves(state, MAX_VALUE)
    assert (not moves) == (len(state) == 1)
    assert len({move.after for move in moves}) == len(moves)
    for step, after in moves:
        assert step.left >= step.right and compute(step.left, step.operator, step.right) == step.result <= MAX_VALUE
        assert sorted((*state, step.result)) == sorted((*after, step.left, step.right))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_reachable_targets_are_those_of_the_steps(size: int) -> None:
    for state in itertools.combinations_with_replacement(range(7), size):
        assert reachable(state, MAX_VALUE) == by_steps(state)


@given(states, st.data())
def test_solutions_exist_exactly_for_reachable_targets_and_their_expressions_hold(state: State, data: st.DataObject) -> None:
    target = data.draw(st.one_of(st.sampled_from(sorted(reachable(state, MAX_VALUE))), st.integers(0, MAX_VALUE)))
    first = list(itertools.islice(solutions(state, target, MAX_VALUE), 20))
    assert bool(first) == (target in reachable(state, MAX_VALUE))
    assert len(set(first)) == len(first)
    for steps in first:
        tree = ast.parse(expression(state, steps), mode="eval")
        assert evaluate(tree.body) == target
        assert sorted(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)) == list(state)


def test_expression_is_readable_and_refuses_steps_that_do_not_fit() -> None:
    steps = [Step(7, "*", 3, 21), Step(21, "+", 5, 26)]
    assert expression((3, 5, 7), steps) == "( 7 * 3 ) + 5"
    with pytest.raises(ValueError, match="takes 21"):
        expression((3, 5, 7), steps[1:])
    with pytest.raises(ValueError, match="2 numbers are left"):
        expression((3, 5, 7), steps[:1])
