"""Checks a second: the verifier pool against math-verify called in a plain loop, on the same rows, in turns within one run.

``python tools/bench_verify.py [FILE.jsonl]``: rows of ``{gold, pred}``; without a file, rows are made here (``--seed``): plain numbers,
and a mix of fractions, roots, polynomials, tuples, intervals and numbers, eight answers to a problem, half of them right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benching import describe_machine

from neox_rl.types import Problem, Verdict
from neox_rl.verify.pool import VerifierPool

BLOCK = 64
ANSWERS = 8
Row = tuple[str, str]
Kind = tuple[str, str, str]
"""A right answer, the same in another spelling, and a wrong one."""
_PROSE = "We write the condition down and simplify it. Both cases lead to the same equation, which has one root in the given range. "


def plain_rows(count: int, rng: random.Random) -> list[Row]:
    """Numbers, as in GSM8K: an integer is asked for, and boxed or given after hashes."""
    return [row for _ in range(0, count, ANSWERS) for row in _answers(*_number(rng), rng)]


def mixed_rows(count: int, rng: random.Random) -> list[Row]:
    """Formulas and some numbers, as in MATH: half of the right answers are spelled in another way than the gold answer."""
    return [row for _ in range(0, count, ANSWERS) for row in _answers(*rng.choice(_KINDS)(rng), rng)]


def _answers(right: str, other: str, wrong: str, rng: random.Random) -> list[Row]:
    """``other``: the right answer in a second spelling."""
    rows: list[Row] = []
    for _ in range(ANSWERS):
        said = rng.choice((right, other)) if rng.random() < 0.5 else wrong
        ending = f"#### {said}" if right.lstrip("-").isdigit() and rng.random() < 0.3 else rf"Hence the answer is $\boxed{{{said}}}$."
        rows.append((right, _PROSE * rng.randint(1, 6) + ending))
    return rows


def _number(rng: random.Random) -> Kind:
    right = str(rng.randint(-5000, 5000))
    return right, right, str(rng.randint(-5000, 5000))


def _fraction(rng: random.Random) -> Kind:
    a, b = rng.randint(1, 40), rng.randint(2, 40)
    return rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{3 * a}}}{{{3 * b}}}", rf"\dfrac{{{a + 1}}}{{{b}}}"


def _root(rng: random.Random) -> Kind:
    a, b = rng.randint(2, 9), rng.choice((2, 3, 5, 7, 11))
    return rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}", rf"\sqrt{{{a * a * b + 1}}}"


def _polynomial(rng: random.Random) -> Kind:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return rf"x^2+{a}x+{b}", rf"{b}+{a}x+x^2", rf"{b}+{a}x-x^2"


def _pair(rng: random.Random) -> Kind:
    a, b = rng.randint(-9, 9), rng.randint(10, 19)
    return rf"({a}, {b})", rf"\left({a},{b}\right)", rf"\left({b}, {a}\right)"


def _interval(rng: random.Random) -> Kind:
    a, b = rng.randint(-9, 0), rng.randint(1, 9)
    return rf"({a},{b}]", rf"\left({a}, {b}\right]", rf"({a},{b})"


def _integer(rng: random.Random) -> Kind:
    right = rng.randint(0, 999)
    return str(right), rf"\frac{{{2 * right}}}{{2}}", str(rng.randint(0, 999))


_KINDS: tuple[Callable[[random.Random], Kind], ...] = (_fraction, _root, _polynomial, _pair, _interval, _integer, _integer, _integer)


def read_rows(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [(str(row["gold"]), str(row["pred"])) for row in rows]


def loop_with_math_verify(rows: Sequence[Row]) -> list[bool]:
    from math_verify import parse, verify

    return [bool(verify(parse(gold if "$" in gold else f"${gold}$"), parse(text))) for gold, text in rows]


def through_pool(pool: VerifierPool, rows: Sequence[Row]) -> list[bool]:
    async def check_all() -> list[Verdict]:
        return await asyncio.gather(*(pool.check(Problem("p", "math", "", gold, "p"), text) for gold, text in rows))

    return [verdict.correct for verdict in asyncio.run(check_all())]


def compare(pool: VerifierPool, name: str, rows: Sequence[Row]) -> float:
    """Prints one line of the table; the ratio of the rates. A block goes to the one, then to the other."""
    spent, differ = [0.0, 0.0], 0
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        begin = time.perf_counter()
        theirs = loop_with_math_verify(block)
        middle = time.perf_counter()
        ours = through_pool(pool, block)
        spent[0] += middle - begin
        spent[1] += time.perf_counter() - middle
        differ += sum(a != b for a, b in zip(ours, theirs, strict=True))
    ratio = spent[0] / spent[1]
    print(f"{name:<12}{len(rows):>6}{len(rows) / spent[0]:>16.0f}{len(rows) / spent[1]:>16.0f}{ratio:>10.2f}{differ:>18}")
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file", type=Path, nargs="?", help="rows of {gold, pred}; without it, rows made by --seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke test: short, figures without meaning")
    parser.add_argument("--deadline-s", type=float, default=5.0, help="of one check; math-verify's own is 5 s too")
    args = parser.parse_args()
    if args.quick:
        args.rows = BLOCK
    describe_machine("math-verify", "sympy")
    logging.disable(logging.ERROR)
    rng = random.Random(args.seed)
    sets = {"file": read_rows(args.file)} if args.file else {"plain": plain_rows(args.rows, rng), "mixed": mixed_rows(args.rows, rng)}
    print(f"{args.workers} workers; checks a second\n")
    print(f"{'rows':<12}{'':>6}{'math-verify':>16}{'pool':>16}{'ratio':>10}{'other verdicts':>18}")
    loop_with_math_verify([*plain_rows(16, random.Random(0)), *mixed_rows(64, random.Random(0))])  # its parser tables are made once
    with VerifierPool(args.workers, args.deadline_s) as pool:
        for name, rows in sets.items():
            compare(pool, name, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
