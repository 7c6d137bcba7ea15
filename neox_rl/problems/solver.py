"""Exact solver over the rationals for Game of 24: which hands can be solved at all, fractions allowed."""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import lru_cache

from neox_rl.arithmetic import State, splits


@lru_cache(1 << 14)
def rational_values(numbers: State) -> frozenset[Fraction]:
    """Every value that + - * / make of all of ``numbers``, in any order and nesting, over the rationals.

    Grows fast: meant for up to four small numbers.
    """
    if len(numbers) == 1:
        return frozenset({Fraction(numbers[0])})
    values: set[Fraction] = set()
    for left, right in splits(numbers):
        for a, b in itertools.product(rational_values(left), rational_values(right)):
            values.update((a + b, a - b, b - a, a * b))
            if b:
                values.add(a / b)
            if a:
                values.add(b / a)
    return frozenset(values)


@lru_cache(1 << 14)
def rationally_solvable(numbers: State, target: int) -> bool:
    """Whether ``numbers`` (sorted) reach ``target`` over the rationals; the last operation is inverted instead of enumerated."""
    if len(numbers) == 1:
        return numbers[0] == target
    for left, right in splits(numbers):
        others = rational_values(right)
        for a in rational_values(left):
            needed = {target - a, a - target, a + target}
            if a:
                needed.add(target / a)
                needed.update((a / target, a * target) if target else ())
            elif target == 0:
                return True  # 0 * b
            if not needed.isdisjoint(others):
                return True
    return False
