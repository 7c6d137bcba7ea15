"""Countdown and the Game of 24, checked exactly over Fractions by a parser of four operators. Pure and bounded.

Grammar, over ASCII digits only:

    equation   = expression { "=" expression }
    expression = [ "-" ] term { ("+" | "-") term }
    term       = factor { ("*" | "/") factor | "(" expression ")" }
    factor     = number | "(" expression ")" | "\frac" "{" expression "}" "{" expression "}"

A sign is taken where ordinary writing has one, at the start of an expression or of parentheses; it makes no number
from nothing, so the numbers rule holds. A factor in parentheses multiplies what stands before it, except after a
division, where readers disagree. Everything else (``**``, ``//``, ``4 6``, decimals, other digits) is no expression.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from neox_rl.metacot import EOS, PAD, SOLUTION
from neox_rl.types import Json, Problem, Reason
from neox_rl.verify.finding import Finding

MAX_CHARS = 400
MAX_DIGITS = 9
MAX_DEPTH = 24
MAX_SIDES = 6
MAX_NUMBERS = 16
GAME24_TARGET = 24
CACHED_ANSWERS = 1 << 10
"""The rollouts of a group find the same few answers. None is longer than MAX_TAIL_CHARS."""

_SYMBOLS = {**dict.fromkeys("\u00d7\u22c5\u00b7\u2217xX", "*"), **dict.fromkeys("\u00f7\u2215", "/"), **dict.fromkeys("\u2212\u2013", "-")}
_COMMANDS = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\dfrac": r"\frac", r"\tfrac": r"\frac"}
_COMMANDS |= dict.fromkeys((r"\left", r"\right", r"\,", r"\;"), "")
_TOKEN = re.compile(r"\s*(?:([0-9]+)|(\\[A-Za-z]+|\\[,;])|(.))", re.DOTALL)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


class ExpressionError(ValueError):
    """The text is no expression of the grammar, or is beyond a cap."""


class Parsed(NamedTuple):
    """The value of an expression and the numbers written in it."""

    value: Fraction
    numbers: tuple[int, ...]


def _tokens(text: str) -> list[str]:
    if len(text) > MAX_CHARS:
        raise ExpressionError(f"{len(text)} characters, at most {MAX_CHARS} are read")
    tokens: list[str] = []
    for number, command, symbol in _TOKEN.findall(text.strip()):
        if number:
            if len(number) > MAX_DIGITS or (number[0] == "0" and number != "0"):
                raise ExpressionError(f"number {number!r} is longer than {MAX_DIGITS} digits or starts with 0")
            tokens.append(number)
        elif command:
            token = _COMMANDS.get(command, command)
            tokens += [token] if token else []
        else:
            tokens.append(_SYMBOLS.get(symbol, symbol))
    return tokens


class _Parser:
    """Recursive descent over one side of an equation."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.numbers: list[int] = []

    def parse(self) -> Parsed:
        value = self.expression()
        if self.at != len(self.tokens):
            raise ExpressionError(f"unexpected {self.tokens[self.at]!r}")
        return Parsed(value, tuple(self.numbers))

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        token = self.peek()
        if token == "" or (wanted and token not in wanted):
            raise ExpressionError(f"found {token!r} where {' or '.join(wanted) or 'more'} was expected")
        self.at += 1
        return token

    def expression(self) -> Fraction:
        sign = -1 if self.peek() == "-" and self.take() else 1
        value = sign * self.term()
        while self.peek() in ("+", "-"):
            value = value + self.term() if self.take() == "+" else value - self.term()
        return value

    def term(self) -> Fraction:
        value = self.factor()
        divided = False
        while (token := self.peek()) in ("*", "/", "(", "["):
            if token in ("(", "["):
                if divided:
                    raise ExpressionError("a product without a sign after a division has two readings")
                value *= self.factor()
            elif self.take() == "*":
                value *= self.factor()
            else:
                divided = True
                value = _divide(value, self.factor())
        return value

    def factor(self) -> Fraction:
        token = self.take()
        if token.isascii() and token.isdigit():
            self.numbers.append(int(token))
            return Fraction(int(token))
        if token == r"\frac":
            return _divide(self.enclosed(self.take("{")), self.enclosed(self.take("{")))
        if token in ("(", "["):
            return self.enclosed(token)
        raise ExpressionError(f"unexpected {token!r}")

    def enclosed(self, opening: str) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"parentheses nested deeper than {MAX_DEPTH}")
        value = self.expression()
        self.take(_CLOSING[opening])
        self.depth -= 1
        return value


def _divide(left: Fraction, right: Fraction) -> Fraction:
    if right == 0:
        raise ExpressionError("division by zero")
    return left / right


def evaluate(text: str) -> Parsed:
    """Value and numbers of one expression, exactly. Raises ExpressionError."""
    return _Parser(_tokens(text)).parse()


def evaluate_equation(text: str) -> list[Parsed]:
    """The sides of ``a = b = ...``, each evaluated. Raises ExpressionError."""
    sides: list[list[str]] = [[]]
    for token in _tokens(text):
        if token == "=":
            sides.append([])
        else:
            sides[-1].append(token)
    if len(sides) > MAX_SIDES:
        raise ExpressionError(f"{len(sides)} sides, at most {MAX_SIDES} are read")
    return [_Parser(side).parse() for side in sides]


# Where a final answer stands. The latest marker in the text counts: a later answer replaces an earlier one.
_ANSWER_TAG = re.compile(r"<answer>", re.IGNORECASE)
_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{")
_ANSWER_WORDS = re.compile(r"\b(?:answer|solution)\b[*\s]*(?:is\b|:)[*:\s]*(?=[\d(\[\-\u2212\\$<])", re.IGNORECASE)
_TRACE_SOLUTION = re.compile(rf"(?:^|(?<=\s)){SOLUTION}\s+(?=[\d(])")
_EOS_TAIL = re.compile(rf"(?:\s*(?:{re.escape(EOS)}|{re.escape(PAD)}))+\s*$")
MAX_TAIL_CHARS = 8192


def final_expression(text: str) -> str:
    """The text of the final answer, empty when there is none. Only the last ``MAX_TAIL_CHARS`` characters are read.

    In this order: after the first trace word ``solution``, everything (a second one makes it no expression); else what
    the latest of ``<answer>``, ``\\boxed{``, ``Answer:`` introduces; else the last line.
    """
    tail = _EOS_TAIL.sub("", text.rpartition("</think>")[2][-MAX_TAIL_CHARS:])
    trace = _TRACE_SOLUTION.search(tail)
    if trace:
        return tail[trace.end() :].strip()
    markers = [m for pattern in (_ANSWER_TAG, _BOXED, _ANSWER_WORDS) for m in pattern.finditer(tail)]
    if not markers:
        lines = tail.strip().splitlines()
        return _undress(lines[-1]) if lines else ""
    marker = max(markers, key=lambda m: m.end())
    rest = tail[marker.end() :]
    if marker.re is _ANSWER_TAG:
        return _undress(rest.partition("</answer>")[0])
    if marker.re is _BOXED:
        return _undress(_braced(rest))
    return _undress(rest.strip().partition("\n")[0])


def _braced(text: str) -> str:
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:i]
    return ""


def _undress(text: str) -> str:
    """Without math delimiters, emphasis and the full stop around an expression."""
    text = text.strip().strip("*$").strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.rstrip(".").endswith(closing):
            text = text.rstrip(".")[2:-2]
    return text.strip().rstrip(".").strip("*$").strip()


class Game(NamedTuple):
    """The numbers to use and the value to make of them."""

    numbers: tuple[int, ...]
    target: int


def game_of(task: str, meta: Mapping[str, Json]) -> Game | None:
    """The game in a problem's ``meta`` (``numbers``, ``target``; 24 where the task is game24), None where it is none."""
    numbers, target = meta.get("numbers"), meta.get("target", GAME24_TARGET if task == "game24" else None)
    if not isinstance(numbers, list | tuple) or not 1 <= len(numbers) <= MAX_NUMBERS or type(target) is not int:
        return None
    ints = [n for n in numbers if type(n) is int and 0 <= n < 10**MAX_DIGITS]
    return Game(tuple(ints), target) if len(ints) == len(numbers) else None


def check_game(game: Game, text: str, use_all: bool = True) -> Finding:
    """Whether the final answer makes the target from the numbers, each at most once; every one of them if ``use_all``.

    In ``a = b = target`` every side must have the value of the target and one side must use the numbers.
    """
    return _judged(game, final_expression(text), use_all)


@lru_cache(CACHED_ANSWERS)
def _judged(game: Game, answer: str, use_all: bool) -> Finding:
    if not any(c.isdigit() for c in answer):
        return Finding(Reason.NO_ANSWER, answer)
    try:
        sides = evaluate_equation(answer)
    except ExpressionError:
        return Finding(Reason.MISMATCH, answer)
    # The bare target on one side of an equation is no use of the numbers, even where the target is one of them.
    written = [Counter(s.numbers) for s in sides if len(sides) == 1 or s.numbers != (game.target,)]
    given = Counter(game.numbers)
    allowed = given in written if use_all else any(used <= given for used in written)
    reached = all(s.value == game.target for s in sides)
    return Finding(Reason.MATCH if allowed and reached else Reason.MISMATCH, answer)


def check_arithmetic(problem: Problem, text: str, use_all: bool = True) -> Finding:
    """``check_game`` on a problem; BAD_GOLD when its ``meta`` holds no game."""
    game = game_of(problem.task, problem.meta)
    return check_game(game, text, use_all) if game else Finding(Reason.BAD_GOLD, str(dict(problem.meta)))


def check_arithmetic_gold(problem: Problem) -> Finding:
    """MATCH when the problem is a game and its ``answer``, if it has one, is the target or solves it; else BAD_GOLD."""
    game = game_of(problem.task, problem.meta)
    if game is None:
        return Finding(Reason.BAD_GOLD, str(dict(problem.meta)))
    if problem.answer.strip() in ("", str(game.target)):
        return Finding(Reason.MATCH, problem.answer)
    solved = check_game(game, problem.answer).reason is Reason.MATCH
    return Finding(Reason.MATCH if solved else Reason.BAD_GOLD, problem.answer)
