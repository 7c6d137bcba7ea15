"""Equality of two formulas on sympy, through math-verify's LaTeX grammar and comparer. Runs only in a killable worker.

No string reaches ``parse_expr`` or ``sympify``: both evaluate Python. Formulas are parsed by math-verify's ANTLR grammar after
``guard`` has passed them. Numbers are compared exactly or to 25 relative digits, functions at rational points; relations, sets
and what cannot be evaluated go to ``math_verify.verify``, gold first.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from antlr4 import PredictionMode
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, _Latex2Sympy
from latex2sympy2_extended.math_normalization import normalize_latex
from math_verify.grader import verify

from neox_rl.verify.guard import refuse_text, require_small

_NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False)
_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_IMAGINARY = re.compile(r"(?<![A-Za-z\\_])i(?![A-Za-z_])|\\imath|\\(?:Re|Im|det)(?![a-z])")
_BOUND_I = re.compile(r"\\(?:sum|prod)_\{?\s*i")
_PRODUCT = re.compile(r"(?<![_\d])(\d+)\s*(?=\()")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
DIGITS = 40
MAX_CONFIRMED_DIGITS = 3000
_CLOSE = sympy.Float("1e-25", DIGITS)
_POINTS = (Fraction(7, 13), Fraction(29, 11), Fraction(-17, 19), Fraction(41, 9))
_INTEGER_POINTS = tuple(Fraction(n) for n in (7, 12, 19, 26, 33, 44))
_INTEGER_NAMES = frozenset("nkmN")


class UnreadableError(ValueError):
    """The formula is not in the grammar, refused by the guard, or has no value."""


class _FastReader(_Latex2Sympy):  # type: ignore[misc]
    """The same grammar in ANTLR's SLL mode: where it succeeds the tree is that of the full mode, several times faster."""

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = PredictionMode.SLL
        return parser


def _read(formula: str, is_complex: bool) -> Any:
    real = None if is_complex else True
    try:
        return _FastReader(is_real=real, config=_CONVERSION).parse(formula)
    # The grammar reports a syntax error as a bare Exception; only then is the full mode needed.
    except Exception:
        return _Latex2Sympy(is_real=real, config=_CONVERSION).parse(formula)


@lru_cache(maxsize=512)
def parse(text: str) -> Any:
    """The sympy object of a normalized formula, unevaluated, decimals exact. Raises UnreadableError."""
    if refusal := refuse_text(text):
        raise UnreadableError(refusal)
    formula = _PRODUCT.sub(r"\1 \\cdot ", text)
    if _TRIG.search(formula):
        formula = _DEGREES.sub(r"\\frac{\1 \\pi}{180}", formula)
    is_complex = bool(_IMAGINARY.search(formula)) and not _BOUND_I.search(formula)
    try:
        expr = _read(normalize_latex(formula, _NORMALIZATION), is_complex)
    except (RecursionError, MemoryError):
        raise
    # The grammar reports a syntax error as a bare Exception, and some of its conversions fail with AttributeError and others.
    except Exception as error:
        raise UnreadableError(str(error)[:80]) from error
    if not isinstance(expr, sympy.Basic | sympy.MatrixBase):
        raise UnreadableError(f"{type(expr).__name__} is no expression")
    require_small(expr)
    if isinstance(expr, sympy.Expr) and expr.has(sympy.Float):
        expr = expr.xreplace({f: sympy.Rational(str(f)) for f in expr.atoms(sympy.Float)})
    if is_complex and isinstance(expr, sympy.Basic):
        expr = expr.xreplace({s: sympy.I for s in expr.free_symbols if s.name == "i"})
    if isinstance(expr, sympy.Expr):
        percents = {u: u.args[0] for u in expr.atoms(sympy.UnevaluatedExpr)}
        expr = expr.xreplace(percents) if percents else expr
    if expr.has(sympy.nan, sympy.zoo) or any(p.base.is_zero and p.exp.is_negative for p in expr.atoms(sympy.Pow)):
        raise UnreadableError("the formula has no value")
    return expr


def _is_function(expr: Any) -> bool:
    return isinstance(expr, sympy.Expr) and not expr.has(sympy.core.function.AppliedUndef, sympy.Integral, sympy.Limit)


def value(expr: Any) -> Any:
    """The number that a closed expression is, to 40 digits; None when it has none."""
    if not _is_function(expr) or expr.free_symbols:
        return None
    number = expr.doit().evalf(DIGITS)
    return number if number.is_number and number.is_finite and number.is_comparable is not None else None


def equal(gold: str, pred: str, interval_as_inequality: bool = True) -> bool:
    """Whether two formulas are equal. Raises UnreadableError where the gold one is unreadable; False where the other is."""
    a = parse(gold)
    try:
        b = parse(pred)
    except UnreadableError:
        return False
    if _is_function(a) and _is_function(b):
        answer = _equal_expressions(a, b)
        if answer is not None:
            return answer
    options = {"float_rounding": 12, "numeric_precision": DIGITS, "allow_set_relation_comp": interval_as_inequality}
    return bool(verify(a, b, timeout_seconds=None, **options))


def _equal_expressions(a: Any, b: Any) -> bool | None:
    """By value, or at rational points where there are symbols; None when neither can be evaluated."""
    if a == b:
        return True
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        return _equal_numbers(a.doit(), b.doit())
    seen = 0
    points = _INTEGER_POINTS if _is_integer_sequence(a) or _is_integer_sequence(b) else _POINTS
    for shift in range(len(points)):
        point = {s: sympy.Rational(*(points[(shift + k) % len(points)] + k).as_integer_ratio()) for k, s in enumerate(symbols)}
        try:
            same = _equal_numbers(a.subs(point).doit(), b.subs(point).doit())
        except (TypeError, ValueError, AttributeError, RecursionError):
            same = None
        if same is False:
            return False
        seen += same is True
    return True if seen >= 2 else None


def _is_integer_sequence(expr: Any) -> bool:
    """Whether the formula is about integers, such as ``(-1)^n``: off them, equal sequences are different functions."""
    # At a fractional limit sympy's sums recurse without end.
    if expr.has(sympy.Sum, sympy.Product):
        return True
    if not {s.name for s in expr.free_symbols} <= _INTEGER_NAMES:
        return False
    signs = any(p.exp.free_symbols and p.base.is_negative for p in expr.atoms(sympy.Pow))
    return signs or expr.has(sympy.floor, sympy.ceiling, sympy.Mod, sympy.sin, sympy.cos, sympy.factorial)


def _equal_numbers(a: Any, b: Any) -> bool | None:
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    if a.has(sympy.nan, sympy.zoo) or b.has(sympy.nan, sympy.zoo):
        return None
    if a.is_infinite or b.is_infinite:
        return bool(a == b)
    x, y = a.evalf(DIGITS), b.evalf(DIGITS)
    if not (x.is_number and y.is_number) or x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo):
        return None
    size = max(abs(x), abs(y))
    if size < _CLOSE:
        # Both vanish to 25 digits: tiny numbers differ by their ratio, a true zero only shows symbolically.
        return bool(sympy.simplify(a - b) == 0)
    if abs(x - y) >= _CLOSE * size:
        return False
    # 2^2009 - 1 and 2^2009 - 3 agree to 600 digits: as many digits as the numbers inside have decide.
    digits = int(min(require_small(a) + require_small(b), MAX_CONFIRMED_DIGITS))
    if digits < DIGITS // 2:
        return True
    x, y = a.evalf(DIGITS + 2 * digits), b.evalf(DIGITS + 2 * digits)
    return bool(abs(x - y) < abs(x) * sympy.Float(10, 20) ** (-digits - DIGITS // 2))
