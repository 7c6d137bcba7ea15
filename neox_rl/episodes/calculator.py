"""A calculator in the loop: ``[CALC 3 * (5 + 2)]`` at the end of a completion is answered by ``= 21``. Exact, bounded, no ``eval``."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARS = 200
MAX_DEPTH = 20
MAX_DIGITS = 60
"""Of a result: longer ones are refused, so that a chain of products costs nothing."""
CALL = re.compile(r"\[CALC ([^\[\]\n]{1,200})\]")
_LAST = re.compile(CALL.pattern + r"\s*$")
_TOKEN = re.compile(r"\s*(?:([0-9]{1,20}(?:\.[0-9]{1,20})?)|([-+*/()]))")


class CalculatorError(ValueError):
    """The text is no expression, or beyond a bound."""


def calculator(text: str) -> str | None:
    """``rollout.Tool``: the line that answers a call at the end of ``text``; None when there is no call."""
    found = _LAST.search(text[-2 * MAX_CHARS :])
    if found is None:
        return None
    try:
        return f"\n= {evaluate(found[1])}\n"
    except CalculatorError as error:
        return f"\n= error: {error}\n"


def evaluate(text: str) -> Fraction:
    """The exact value of an expression of numbers, + - * / and parentheses. Raises CalculatorError."""
    tokens = _tokens(text)
    value, end = _sum(tokens, 0, 0)
    if end != len(tokens):
        raise CalculatorError(f"unexpected {tokens[end]}")
    return value


def _tokens(text: str) -> list[str]:
    tokens, at, text = [], 0, text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or len(text) > MAX_CHARS:
            raise CalculatorError("no expression of numbers, + - * / and parentheses")
        tokens.append(found[1] or found[2])
        at = found.end()
    return tokens


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        term, after = _product(tokens, at + 1, depth)
        value, at = _bounded(value + term if tokens[at] == "+" else value - term), after
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        factor, after = _factor(tokens, at + 1, depth)
        if tokens[at] == "/" and not factor:
            raise CalculatorError("division by zero")
        value, at = _bounded(value * factor if tokens[at] == "*" else value / factor), after
    return value, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if at >= len(tokens) or depth > MAX_DEPTH:
        raise CalculatorError("the expression ends early, or is nested too deeply")
    if tokens[at] == "-":
        value, at = _factor(tokens, at + 1, depth + 1)
        return -value, at
    if tokens[at] == "(":
        value, at = _sum(tokens, at + 1, depth + 1)
        if tokens[at : at + 1] != [")"]:
            raise CalculatorError("a parenthesis is not closed")
        return value, at + 1
    if not tokens[at][0].isdigit():
        raise CalculatorError(f"unexpected {tokens[at]}")
    return Fraction(tokens[at]), at + 1


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise CalculatorError(f"a number of more than {MAX_DIGITS} digits")
    return value
