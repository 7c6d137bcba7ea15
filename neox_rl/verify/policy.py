"""The choices that a mathematics checker has to make."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MathPolicy:
    """What public suites disagree on, each a switch.

    ``percent_sign_optional``: 10% also matches 10, beside 0.1. ``ordered_lists``: 1, 2 differs from 2, 1 (tuples are always
    ordered). ``reduced_fractions``: 2/4 is wrong for 1/2. ``interval_as_inequality``: [0, 1] matches 0 <= x <= 1.
    ``case_sensitive``: the variable C differs from c (words never do). ``units_must_match``: where both sides name a unit it
    must be the same; a missing one is taken from the question. ``rounded_digits``: significant digits from which a decimal
    matches the number that it rounds; an integer is never rounded to.
    """

    percent_sign_optional: bool = True
    ordered_lists: bool = False
    reduced_fractions: bool = False
    interval_as_inequality: bool = True
    case_sensitive: bool = True
    units_must_match: bool = True
    rounded_digits: int = 6


DEFAULT_POLICY = MathPolicy()
