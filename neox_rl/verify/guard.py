r"""What sympy may see: a whitelist of characters and commands, and bounds on the size of what an expression can become.

A refused answer costs microseconds; one that slips through costs its worker the deadline and its life.
"""

from __future__ import annotations

import math
import re
from typing import Any

MAX_CHARS = 600
MAX_NESTING = 24
MAX_OPERATORS = 160
MAX_DIGIT_RUN = 400
MAX_LOG10 = 20_000.0
MAX_FACTORIAL = 5_000.0
MAX_SUM_TERMS = 10_000.0
MAX_EXPANSION = 24.0

_ALLOWED = re.compile(r"[A-Za-z0-9\s\\{}()\[\]|+\-*/^_=<>.,:;!'&%]*")
_COMMANDS = frozenset(
    re.findall(
        r"\w+",
        """
        frac sqrt cdot pm mp pi infty e sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp min
        max gcd lcm mod bmod pmod binom choose sum prod int lim to begin end lfloor rfloor lceil rceil leq geq neq in
        notin cup cap setminus emptyset subset mathbb text alpha beta gamma delta epsilon varepsilon zeta eta theta
        vartheta iota kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi
        Sigma Phi Psi Omega circ angle triangle overline vec bar det Re Im imath over wedge vee land lor times div
        langle rangle ldots equiv forall perp parallel
        """,
    )
)
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_HUGE_BINOMIAL = re.compile(r"\\binom\s*\{[^{}]*(?:\d{5,}|[\^!])|(?:\d{5,}|[\^!])[^{}]*\\choose")


def refuse_text(text: str) -> str:
    """Why sympy must not see this formula, empty when it may."""
    if len(text) > MAX_CHARS:
        return f"{len(text)} characters, at most {MAX_CHARS}"
    if not _ALLOWED.fullmatch(text):
        return "a character outside the whitelist"
    unknown = [c for c in _COMMAND.findall(text) if c.isalpha() and c not in _COMMANDS]
    if unknown:
        return f"unknown command {unknown[0][:20]!r}"
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        return f"nested {deepest} deep, at most {MAX_NESTING}"
    if sum(text.count(c) for c in "+-*/^=<>!_") + text.count("\\") > MAX_OPERATORS:
        return f"more than {MAX_OPERATORS} operators"
    if re.search(rf"\d{{{MAX_DIGIT_RUN},}}", text):
        return f"a number of more than {MAX_DIGIT_RUN} digits"
    if text.count("!") > 8 or "!!!" in text:
        return "a tower of factorials"
    if _HUGE_BINOMIAL.search(text):
        return "a huge binomial"
    return ""


class TooLargeError(ValueError):
    """Evaluating the expression would make a number or an expansion beyond the bounds."""


def require_small(expr: Any) -> float:
    """An upper bound on the decimal digits that evaluating needs. Raises TooLargeError beyond the bounds."""
    return _log10(expr)


def _log10(expr: Any) -> float:
    """An upper bound on log10 of the size of numbers in ``expr`` once evaluated; symbols count as 10."""
    name = type(expr).__name__
    if getattr(expr, "is_Number", False):
        return _log10_number(expr)
    sizes = [_log10(arg) for arg in getattr(expr, "args", ())]
    if name == "Pow":
        size = _log10_pow(expr, sizes)
    elif name == "exp":
        size = 10 ** min(sizes[0], 9.0)
    elif name in ("factorial", "factorial2", "binomial", "gamma", "RisingFactorial", "FallingFactorial"):
        if max(sizes) > math.log10(MAX_FACTORIAL) and not expr.args[0].free_symbols:
            raise TooLargeError(f"{name} of a number beyond {MAX_FACTORIAL:.0f}")
        size = 10 ** min(max(sizes), 4.0) * 4
    elif name in ("Sum", "Product"):
        _require_short(expr)
        size = max(sizes) * (MAX_SUM_TERMS if name == "Product" else 1) if name == "Sum" else max(sizes) * 100
    elif name == "Mul":
        size = sum(sizes)
    else:
        size = max(sizes, default=1.0) + 1.0
    if size > MAX_LOG10:
        raise TooLargeError(f"{name} of about 10^{size:.0f} digits' worth")
    return size


def _log10_number(number: Any) -> float:
    if getattr(number, "is_Rational", False):
        return max(int(number.p).bit_length(), int(number.q).bit_length()) * 0.30103
    if getattr(number, "is_Float", False):
        return max(1.0, abs(float(str(number).lower().partition("e")[2] or 0)) + 2.0)
    return 1.0


def _log10_pow(expr: Any, sizes: list[float]) -> float:
    base, exponent = expr.args
    if sizes[1] > math.log10(MAX_LOG10) and exponent.is_number:
        raise TooLargeError("a power tower")
    power = abs(float(exponent)) if exponent.is_Rational else 10 ** min(sizes[1], 4.5) if exponent.is_number else 10.0
    if getattr(base, "is_Add", False) and base.free_symbols and exponent.is_Integer and power * len(base.args) > MAX_EXPANSION * 3:
        raise TooLargeError(f"power {power:.0f} of a sum of {len(base.args)} terms")
    return max(sizes[0], 0.31) * max(power, 1.0)


def _require_short(expr: Any) -> None:
    for limit in expr.args[1:]:
        _, low, high = (*limit.args, None, None)[:3]
        span = (high - low) if low is not None and high is not None else None
        if span is not None and span.is_number and (not span.is_finite or float(span) > MAX_SUM_TERMS):
            raise TooLargeError(f"a sum of more than {MAX_SUM_TERMS:.0f} terms")
