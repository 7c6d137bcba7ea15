"""Labeled pairs of mathematical answers by construction: seeded, from no data set. ``python -m tests.unit.answer_pairs 5000 > pairs.jsonl``

Each kind draws an answer and returns it with rewritings of the same value and with other values. What makes two of them equal or
different is arithmetic on the drawn integers, never the checker. Every prediction stands in one of CARRIERS. Rows are what
``python -m neox_rl.verify --task math`` reads: ``{id, gold, pred, expected}``.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

from tests.unit.answer_numbers import (
    Drawn,
    Rng,
    base,
    complex_number,
    counting,
    currency,
    decimal,
    degrees,
    factorials,
    frac,
    fraction,
    integer,
    logarithm,
    mixed,
    percent,
    pi_multiple,
    power,
    ratio,
    repeating,
    scientific,
    surd,
    surd_quotient,
    thousands,
    tiny,
    unit,
)


def interval(rng: Rng) -> Drawn:
    a, b = sorted(rng.sample(range(-30, 30), 2))
    lo, hi = rng.choice("(["), rng.choice(")]")
    other_lo, other_hi = "([".replace(lo, ""), ")]".replace(hi, "")
    low, high = {"(": "<", "[": "\\le"}[lo], {")": "<", "]": "\\leq"}[hi]
    right = (f"\\left{lo}{a}, {b}\\right{hi}", f"{a} {low} x {high} {b}", f"x \\in {lo}{a}, {b}{hi}", f"{lo}{a}.0,{2 * b}/2{hi}")
    wrong = (
        f"{other_lo}{a}, {b}{hi}",
        f"{lo}{a}, {b}{other_hi}",
        f"{lo}{a}, {b + 1}{hi}",
        f"{lo}{a - 1}, {b}{hi}",
        f"{a}, {b + 1}",
        f"{lo}{a}, \\infty)",
    )
    return Drawn(f"{lo}{a}, {b}{hi}", right, wrong)


def union(rng: Rng) -> Drawn:
    a, b, c = sorted(rng.sample(range(-30, 30), 3))
    right = (
        f"({b}, {c}] \\cup (-\\infty, {a})",
        f"(-\\infty,{a})\\cup({b},{c}]",
        f"\\left(-\\infty, {a}\\right) \\cup \\left({b}, {c}\\right]",
    )
    wrong = (
        f"(-\\infty, {a}] \\cup ({b}, {c}]",
        f"(-\\infty, {a})",
        f"(-\\infty, {a}) \\cup ({b}, {c})",
        f"(-\\infty, {a}) \\cap ({b}, {c}]",
        "(-\\infty, \\infty)",
    )
    return Drawn(f"(-\\infty, {a}) \\cup ({b}, {c}]", right, wrong)


def some_set(rng: Rng) -> Drawn:
    items = rng.sample(range(-20, 60), rng.randint(2, 5))
    mixed_up = rng.sample(items, len(items))
    text = ", ".join
    strings, shuffled = [str(i) for i in items], [str(i) for i in mixed_up]
    right = (f"\\{{{text(shuffled)}\\}}", text(shuffled), f"\\left\\{{{text(strings)}\\right\\}}")
    wrong = (f"\\{{{text(strings[1:])}\\}}", f"\\{{{text([*strings, '77'])}\\}}", f"\\{{{text(['77', *strings[1:]])}\\}}", strings[0])
    return Drawn(f"\\{{{text(strings)}\\}}", right, wrong)


def point(rng: Rng) -> Drawn:
    a, b = rng.sample(range(-20, 40), 2)
    half = Fraction(a, 2)
    right = (f"\\left({frac(half)}, {b}\\right)", f"({a / 2},{b})", f"( {a}/2 , {b} )", f"(x, y) = ({frac(half)}, {b})")
    wrong = (
        f"({b}, {frac(half)})" if half != b else "(1, 99)",
        f"({frac(half)}, {b + 1})",
        f"({frac(half)}, {b}, 0)",
        f"({frac(half + 1)}, {b})",
        f"{b}",
    )
    return Drawn(f"({frac(half)}, {b})", right, wrong)


def solutions(rng: Rng) -> Drawn:
    a, b = sorted(rng.sample(range(-30, 40), 2))
    right = (
        f"{b}, {a}",
        f"{a} and {b}",
        f"x = {a}, x = {b}",
        f"\\{{{a}, {b}\\}}",
        f"{a} \\text{{ or }} {b}",
        f"x = {b} \\text{{ or }} x = {a}",
    )
    return Drawn(f"{a}, {b}", right, (f"{a}", f"{b}", f"{a}, {b}, {b + 1}", f"{a}, {b + 1}", f"{a} + {b}", f"{a}{b}"))


def plus_minus(rng: Rng) -> Drawn:
    a, b = rng.randint(1, 20), rng.choice((2, 3, 5, 7, 11))
    right = (f"{a} + \\sqrt{{{b}}}, {a} - \\sqrt{{{b}}}", f"{a}\\pm\\sqrt{b}", f"{a} - \\sqrt{b} \\text{{ and }} {a} + \\sqrt{b}")
    wrong = (f"{a} + \\sqrt{{{b}}}", f"{a} \\pm {b}", f"{a + 1} \\pm \\sqrt{{{b}}}", f"\\pm \\sqrt{{{b}}}", f"-{a} \\pm \\sqrt{{{b}}}")
    return Drawn(f"{a} \\pm \\sqrt{{{b}}}", right, wrong)


def line(rng: Rng) -> Drawn:
    m, c = rng.randint(2, 9), rng.randint(1, 20)
    right = (f"y = {c} + {m}x", f"{m}x + {c}", f"y - {c} = {m}x", f"{2 * m}x - 2y + {2 * c} = 0", f"y={m}\\cdot x+{c}")
    return Drawn(
        f"y = {m}x + {c}",
        right,
        (f"y = {m}x - {c}", f"y = -{m}x + {c}", f"y = {m + 1}x + {c}", f"y = {m}x + {c + 1}", f"x = {m}y + {c}", f"{c}"),
    )


def polynomial(rng: Rng) -> Drawn:
    a, b = rng.sample(range(1, 12), 2)
    s, p = a + b, a * b
    right = (f"(x+{a})(x+{b})", f"(x+{b})\\left(x+{a}\\right)", f"{p} + {s}x + x^2", f"x^{{2}}+{s}x+{p}", f"x(x+{s})+{p}")
    wrong = (
        f"x^2 - {s}x + {p}",
        f"x^2 + {s}x - {p}",
        f"x^2 + {s + 1}x + {p}",
        f"x^3 + {s}x + {p}",
        f"(x-{a})(x-{b})",
        f"y^2 + {s}y + {p}",
        f"(x+{a})(x+{b + 1})",
    )
    return Drawn(f"x^2 + {s}x + {p}", right, wrong)


def rational_function(rng: Rng) -> Drawn:
    a, b = sorted(rng.sample(range(1, 15), 2), reverse=True)
    right = (f"1 + \\frac{{{a - b}}}{{x+{b}}}", f"(x+{a})/(x+{b})", f"\\dfrac{{{a}+x}}{{{b}+x}}", f"\\frac{{2x+{2 * a}}}{{2x+{2 * b}}}")
    return Drawn(
        f"\\frac{{x+{a}}}{{x+{b}}}",
        right,
        (f"\\frac{{x+{b}}}{{x+{a}}}", f"\\frac{{x-{a}}}{{x+{b}}}", frac(Fraction(a, b)) + "x", f"\\frac{{x+{a}}}{{{b}}}"),
    )


def matrix(rng: Rng) -> Drawn:
    a, b, c, d = rng.sample(range(-9, 20), 4)

    def write(kind: str, *cells: int) -> str:
        return f"\\begin{{{kind}}} {cells[0]} & {cells[1]} \\\\ {cells[2]} & {cells[3]} \\end{{{kind}}}"

    wrong = (write("pmatrix", a, c, b, d), write("pmatrix", a, b, c, d + 1), write("pmatrix", -a - 1, b, c, d), f"{a}, {b}, {c}, {d}")
    tight = f"\\begin{{pmatrix}}{a}&{b}\\\\{c}&{d}\\end{{pmatrix}}"
    return Drawn(
        write("pmatrix", a, b, c, d), (write("bmatrix", a, b, c, d), tight, f"\\left({write('matrix', a, b, c, d)}\\right)"), wrong
    )


def inequality(rng: Rng) -> Drawn:
    a = rng.randint(-30, 40)
    right = (f"{a} < x", f"({a}, \\infty)", f"x \\in ({a}, \\infty)", f"x>{2 * a}/2", f"x \\gt {a}")
    return Drawn(f"x > {a}", right, (f"x \\geq {a}", f"x < {a}", f"x > {a + 1}", f"[{a}, \\infty)", f"(-\\infty, {a})", f"{a}", f"x = {a}"))


WORDS = ("Thursday", "Alice", "blue", "isosceles", "ellipse", "even", "north", "parabola", "heptagon", "circle")


def words(rng: Rng) -> Drawn:
    a, b = rng.sample(WORDS, 2)
    right = (a.lower(), a.upper(), f"\\text{{{a}}}", f"\\text{{ {a.lower()} }}", f"\\textbf{{{a}}}", f"{a}.")
    return Drawn(a, right, (b, f"\\text{{{b}}}", f"not {a}", f"{a} or {b}", f"{a}, {b}", f"{a[:-1]}"))


def choice(rng: Rng) -> Drawn:
    a, b, c = rng.sample("ABCDE", 3)
    right = (f"({a})", f"{a}.", f"\\text{{({a})}}", f"\\textbf{{{a}}}", f"\\mathrm{{{a}}}", f"\\text{{{a}}}")
    return Drawn(a, right, (b, f"({c})", f"\\text{{{b}}}", f"{a}, {b}", f"{a} or {b}", f"{a}{b}", "A, B, C, D, E", f"not {a}"))


def sequence(rng: Rng) -> Drawn:
    a = rng.randint(2, 9)
    right = (f"\\frac{{n^2+{a}n}}{{2}}", f"\\frac{{1}}{{2}}n(n+{a})", f"n(n+{a})/2", f"\\frac{{({a}+n)n}}{{2}}")
    return Drawn(
        f"\\frac{{n(n+{a})}}{{2}}",
        right,
        (f"\\frac{{n(n-{a})}}{{2}}", f"n(n+{a})", f"\\frac{{n(n+{a + 1})}}{{2}}", f"\\frac{{n^2+{a}}}{{2}}", f"\\frac{{m(m+{a})}}{{2}}"),
    )


def exponential(rng: Rng) -> Drawn:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    right = (f"{a}(e^x)^{{{b}}}", f"{a}\\cdot e^{{{b}x}}", f"{a}e^{{x}}e^{{{b - 1}x}}", f"{a}\\mathrm{{e}}^{{{b}x}}")
    return Drawn(f"{a}e^{{{b}x}}", right, (f"{a}e^{{-{b}x}}", f"{a + 1}e^{{{b}x}}", f"{a}e^{{{b + 1}x}}", f"{a}e^{b}x", f"{a * b}e^{{x}}"))


def several_variables(rng: Rng) -> Drawn:
    k = rng.randint(2, 9)
    right = (f"a^2 + {2 * k}ab + {k * k}b^2", f"({k}b + a)^2", f"(a + {k}b)(a + {k}b)", f"a^{{2}}+{k * k}b^{{2}}+{2 * k}ba")
    return Drawn(
        f"(a + {k}b)^2",
        right,
        (f"(a - {k}b)^2", f"a^2 + {k * k}b^2", f"(b + {k}a)^2", f"(a + {k + 1}b)^2", f"(a + {k}c)^2", f"(a + {k}b)^3"),
    )


KINDS: Mapping[str, Callable[[Rng], Drawn]] = {
    f.__name__: f
    for f in (
        integer, thousands, decimal, fraction, mixed, percent, unit, currency, degrees, interval, union, some_set, point, solutions,
        plus_minus, line, polynomial, rational_function, surd, surd_quotient, matrix, inequality, words, choice, scientific, tiny, base,
        power, logarithm, pi_multiple, complex_number, ratio, counting, factorials, sequence, exponential, several_variables, repeating,
    )
}  # fmt: skip


CARRIERS = (
    "\\boxed{@}",
    "We add the two and get the result.\nThe final answer is $\\boxed{@}$.",
    "First 12 + 5 = 17, which is odd.\n\nTherefore the answer is \\(\\boxed{@}\\).",
    "<think>Could it be \\boxed{12345}? No.</think>\nSo we have\n\\[\\boxed{@}\\]",
    "Step 1: $3 + 4 = 7$.\nStep 2: done.\n**Final Answer:** $@$",
    "Hence the answer is $@$.",
    "<answer>@</answer>",
    "Some work with 3 and 4.\n#### @",
)


class Pair(NamedTuple):
    id: str
    gold: str
    pred: str
    expected: bool


def pairs(count: int, seed: int) -> Iterator[Pair]:
    """``count`` pairs, kinds in turn, about as many right as wrong."""
    names = list(KINDS)
    for i in range(count):
        rng = random.Random(f"pair/{seed}/{i}")
        name = names[i % len(names)]
        drawn = KINDS[name](rng)
        expected = rng.random() < 0.5
        answer = rng.choice((drawn.gold, *drawn.right) if expected else drawn.wrong)
        gold = rng.choice((drawn.gold, f"${drawn.gold}$"))
        yield Pair(f"{name}/{i}", gold, rng.choice(CARRIERS).replace("@", answer), expected)


if __name__ == "__main__":
    for pair in pairs(int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0])):
        print(json.dumps(pair._asdict()))
