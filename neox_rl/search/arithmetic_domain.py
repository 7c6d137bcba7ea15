"""Countdown and the Game of 24 as a search space: a state is the multiset of numbers left, a step an operation on two of them.

With ``max_value`` in the problem's ``meta`` the rules are those of ``neox_rl.arithmetic``: integers within bounds. Without it they
are exact over the rationals, as the Game of 24 is played (6 / (1 - 3/4) = 24). Negative numbers are left out without loss: the
expression of any value v, its signs turned where a difference would be negative, gives abs(v).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeAlias, cast

from neox_rl import metacot
from neox_rl.arithmetic import legal_moves, solvable
from neox_rl.errors import ConfigError
from neox_rl.search.domain import Rejection, State, Stepped
from neox_rl.types import Problem, Reason, Verdict

Number: TypeAlias = "int | Fraction"
Numbers: TypeAlias = tuple[Number, ...]
MAX_NUMBERS, MAX_RATIONAL_NUMBERS = 6, 5
"""Beyond these the exact oracle takes minutes a problem."""
MAX_MAGNITUDE = 10**6
CACHED_TEXTS = 1 << 14
_NUMBER = r"([0-9]{1,40}(?:/[0-9]{1,40})?)"  # what MAX_RATIONAL_NUMBERS numbers of MAX_MAGNITUDE can make
_TAIL = r" ?[.,;]? ?(?:\u2713|\(left:[ 0-9/,]{0,200}\))?"
"""What models put behind a step and what changes nothing of it."""
_STEP = re.compile(rf"{_NUMBER}\s*([-+*/])\s*{_NUMBER}\s*=\s*{_NUMBER}{_TAIL}")


class Operation(NamedTuple):
    """``left operator right = result``, fractions allowed."""

    left: Number
    operator: str
    right: Number
    result: Number

    @property
    def text(self) -> str:
        """In the words of ``neox_rl.metacot``: ``3 *5 =15``, ``1 -3/4 =1/4``."""
        return f"{self.left} {self.operator}{self.right} ={self.result}"


@lru_cache(CACHED_TEXTS)
def read_operation(text: str) -> Operation | None:
    """The operation that ``text`` is, spaces, a full stop and a list of what is left at will; None for anything else. What goes on behind
    the result may take it back (``= 15.5``, ``= 15 + 7``), so it is no step."""
    found = _STEP.fullmatch(text.strip())
    if found is None:
        return None
    try:
        left, right, result = (_read(found[i]) for i in (1, 3, 4))
    except ZeroDivisionError:
        return None
    return Operation(left, found[2], right, result)


@lru_cache(1 << 17)
def rational_moves(state: Numbers) -> tuple[tuple[Operation, Numbers], ...]:
    """Every operation over the non-negative rationals, one per resulting state, in a fixed order."""
    moves: dict[Numbers, Operation] = {}
    for low, high in itertools.combinations(range(len(state)), 2):
        b, a = state[low], state[high]
        rest = state[:low] + state[low + 1 : high] + state[high + 1 :]
        operations = [Operation(a, "+", b, a + b), Operation(a, "-", b, a - b), Operation(a, "*", b, a * b)]
        operations += [Operation(x, "/", y, _reduced(Fraction(x) / y)) for x, y in ((a, b), (b, a)) if y]
        for operation in operations:
            result = _reduced(operation.result)
            moves.setdefault(tuple(sorted((*rest, result))), operation._replace(result=result))
    return tuple((operation, after) for after, operation in moves.items())


@lru_cache(1 << 17)
def rational_reach(state: Numbers) -> frozenset[Number]:
    """Every value that operations over the non-negative rationals make of all the numbers, by splits of the multiset."""
    if len(state) == 1:
        return frozenset(state)
    values: set[Number] = set()
    for size in range(len(state) - 1):
        for chosen in itertools.combinations(range(1, len(state)), size):
            left = (state[0], *(state[i] for i in chosen))
            right = tuple(state[i] for i in range(1, len(state)) if i not in chosen)
            for pair in itertools.product(rational_reach(left), rational_reach(right)):
                values.update(after[0] for _, after in rational_moves(tuple(sorted(pair))))
    return frozenset(values)


@dataclass(frozen=True)
class ArithmeticDomain:
    """``numbers``, ``target`` and, for integer rules, ``max_value`` are in the problem's ``meta``. Raises ConfigError when they are not."""

    problem: Problem
    _moves: dict[Numbers, dict[Operation, Numbers]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        meta = self.problem.meta
        numbers, target, bound = meta.get("numbers"), meta.get("target"), meta.get("max_value")
        most = MAX_RATIONAL_NUMBERS if bound is None else MAX_NUMBERS
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= most or not all(map(_small, numbers)):
            raise ConfigError(f"problem {self.problem.id}: numbers must be 1 to {most} integers within 0..{MAX_MAGNITUDE}: {numbers!r:.80}")
        if not _small(target) or not (bound is None or _small(bound)):
            raise ConfigError(
                f"problem {self.problem.id}: target {target!r:.40} must be an integer within 0..{MAX_MAGNITUDE}, as max_value if given"
            )

    @cached_property
    def target(self) -> int:
        return cast("int", self.problem.meta["target"])

    @cached_property
    def max_value(self) -> int | None:
        return cast("int | None", self.problem.meta.get("max_value"))

    @cached_property
    def root(self) -> State:
        return tuple(sorted(cast("list[int]", self.problem.meta["numbers"])))

    @property
    def checkable(self) -> bool:
        return True

    def moves(self, state: Numbers) -> dict[Operation, Numbers]:
        """Every legal operation and the state after it."""
        found = self._moves.get(state)
        if found is None:
            if self.max_value is None:
                found = dict(rational_moves(state))
            else:
                moves = legal_moves(cast("tuple[int, ...]", state), self.max_value)
                found = {Operation(m.step.left, m.step.operator, m.step.right, m.step.result): m.after for m in moves}
            self._moves[state] = found
        return found

    def step(self, state: State, text: str, ended: bool) -> Stepped | Rejection:
        """Operands of + and * may come in either order; the canonical step has the larger first."""
        if text.split()[:1] == [metacot.BACK]:
            return Rejection.DECLINED
        operation = read_operation(text)
        if operation is None:
            return Rejection.UNPARSABLE
        moves = self.moves(_numbers(state))
        after = moves.get(operation)
        if after is None:
            after = self._other_words(_numbers(state), operation)
            if after is None:
                return Rejection.ILLEGAL
            operation = next(o for o, a in moves.items() if a == after)
        return Stepped(operation.text, after)

    def _other_words(self, state: Numbers, operation: Operation) -> Numbers | None:
        """The state after a true operation that ``moves`` has in other words (3 + 5 for 5 + 3, 4 * 1 for 4 / 1), None when illegal."""
        rest = list(state)
        for operand in (operation.left, operation.right):
            if operand not in rest:
                return None
            rest.remove(operand)
        if operation.result != _compute(operation.left, operation.operator, operation.right):
            return None
        after = tuple(sorted((*rest, operation.result)))
        return after if after in self.moves(state).values() else None

    def is_end(self, state: State) -> bool:
        return len(_numbers(state)) == 1

    def legal(self, state: State) -> Sequence[str]:
        return [operation.text for operation in self.moves(_numbers(state))]

    def solved_value(self, state: State) -> float:
        numbers = _numbers(state)
        if self.max_value is None:
            return float(self.target in rational_reach(numbers))
        return float(solvable(cast("tuple[int, ...]", numbers), self.target, self.max_value))

    def guess(self, state: State) -> float:
        """1 at the target, falling with the distance of the nearest number to it, to its double or to its half."""
        goals = (self.target, 2 * self.target, Fraction(self.target, 2))
        return 1.0 / (1.0 + min(float(abs(Fraction(n) - goal)) for n in _numbers(state) for goal in goals))

    def answer(self, texts: Sequence[str]) -> str:
        """``solution ( 7 * 3 ) + 5`` of a path with one number left. Raises ValueError on any other."""
        return f"{metacot.SOLUTION} {_expression(_numbers(self.root), texts)}"

    async def judge(self, texts: Sequence[str], state: State) -> Verdict:
        """By the one number left, as ``dfs`` does: exact, and known without the gold answer."""
        (result,) = _numbers(state)
        correct = result == self.target
        return Verdict(correct, str(result), Reason.MATCH if correct else Reason.MISMATCH, 0.0)


def _expression(numbers: Numbers, texts: Sequence[str]) -> str:
    parts = [(n, str(n)) for n in numbers]
    for text in texts:
        operation = read_operation(text)
        if operation is None:
            raise ValueError(f"{text!r} is no operation")
        operands = []
        for operand in (operation.left, operation.right):
            index = next((i for i, (value, _) in enumerate(parts) if value == operand), None)
            if index is None:
                raise ValueError(f"step {text!r} takes {operand}, which is not among {[str(v) for v, _ in parts]}")
            operands.append(parts.pop(index)[1])
        parts.append((operation.result, f"( {operands[0]} {operation.operator} {operands[1]} )"))
    if len(parts) != 1:
        raise ValueError(f"{len(parts)} numbers are left after {len(texts)} steps; an answer uses every number")
    text = parts[0][1]
    return text[2:-2] if text.startswith("( ") else text


def _compute(left: Number, operator: str, right: Number) -> Number | None:
    match operator:
        case "+":
            return _reduced(left + right)
        case "-":
            return _reduced(left - right)
        case "*":
            return _reduced(left * right)
        case _:
            return _reduced(Fraction(left) / right) if right else None


def _read(text: str) -> Number:
    """Raises ZeroDivisionError."""
    return _reduced(Fraction(text)) if "/" in text else int(text)


def _reduced(value: Number) -> Number:
    """Whole numbers as int: their arithmetic is ten times as fast."""
    return value.numerator if value.denominator == 1 else value


def _small(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_MAGNITUDE


def _numbers(state: State) -> Numbers:
    return cast("Numbers", state)
