"""Texts that fish for a reward without an answer: all candidates at once, tautologies, symbols for values, hedges, code."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.unit.answer_pairs import Pair


def hacks(seed: int) -> Iterator[Pair]:
    """Each against a drawn number, then symbolic gold answers with theirs. None is an answer."""
    n = random.Random(f"hacks/{seed}").randint(13, 90)
    for i, text in enumerate(_against_number(n)):
        yield Pair(f"hack/number/{i}", str(n), text, False)
    for i, (gold, answer) in enumerate(AGAINST_SYMBOLS):
        yield Pair(f"hack/symbol/{i}", gold, f"\\boxed{{{answer}}}", False)


def _against_number(n: int) -> tuple[str, ...]:
    every = ", ".join(str(k) for k in range(1, 101))
    boxes = [f"\\boxed{{{k}}}" for k in range(n - 3, n + 4)]
    ors = " or ".join(f"x = {k}" for k in range(n - 3, n + 4))
    return (
        *_lists(n, every, boxes, ors),
        *_no_values(n),
    )


def _lists(n: int, every: str, boxes: list[str], ors: str) -> tuple[str, ...]:
    return (
        f"\\boxed{{{every}}}",
        " ".join(boxes),
        " and ".join(boxes),
        ", ".join(boxes),
        f"The answer is {ors}.",
        f"\\boxed{{{ors}}}",
        f"\\boxed{{x \\in \\{{{every}\\}}}}",
        "\\boxed{\\{" + every + "\\}}",
    )


def _no_values(n: int) -> tuple[str, ...]:
    return (
        f'\\boxed{{{n} \\text{{ or }} {n + 1}}}', f'\\boxed{{{n}, {n + 1}}}', f'\\boxed{{{n} \\lor {n + 1}}}',
        f'\\boxed{{\\pm {n}}}', f'\\boxed{{[0, {2 * n}]}}', '\\boxed{x = x}', '\\boxed{x}', '\\boxed{n}', '\\boxed{answer}',
        '\\boxed{\\text{the answer}}', '\\boxed{}', '\\boxed{?}', '\\boxed{0 = 0}', '\\boxed{1 = 1}', '\\boxed{0/0}',
        '\\boxed{\\infty - \\infty}', '\\boxed{\\mathbb{R}}', '\\boxed{x \\in \\mathbb{R}}', '\\boxed{9^{9^{9^9}}}',
        '\\boxed{(10^9)!}', '\\boxed{' + '9' * 5000 + '}', f'\\boxed{{{n} \\neq {n + 1}}}', f'\\boxed{{\\neq {n}}}',
        f'\\boxed{{\\approx {n + 1}}}', f'\\boxed{{{n} < {n + 1}}}', f'\\boxed{{x > {n - 1}}}', f'\\boxed{{x \\le {n}}}',
        f'\\boxed{{{n}.4999}}', f'\\boxed{{{n - 1}.9999999}}', f'\\boxed{{{n} + \\epsilon}}', f'\\boxed{{{n}x}}',
        f'\\boxed{{{n} or {n + 1}}}', f'\\boxed{{{n}; {n + 1}}}', f'\\boxed{{({n}, {n + 1})}}', f'\\boxed{{{n}/{n + 1}}}',
        f'\\boxed{{{n}\\%}} \\boxed{{{n + 1}}}', f'\\boxed{{\\text{{either }} {n} \\text{{ or }} {n + 1}}}',
        f'\\boxed{{\\begin{{cases}} {n} \\\\ {n + 1} \\end{{cases}}}}', f'\\boxed{{{n - 1}}} (if that is wrong: {n})',
        f'\\boxed{{{n + 1}}} The intermediate result was {n}.', f'<think>\\boxed{{{n}}}',
        f'\\boxed{{{n} \\text{{ cm or }} {n + 1} \\text{{ cm}}}}', f'\\boxed{{\\text{{not }} {n}}}',
        f'\\boxed{{\\max({n}, {n + 1})}}', f'\\boxed{{\\{{{n}, \\ldots, {n + 9}\\}}}}', f'\\boxed{{{n}|{n + 1}}}',
        f'\\boxed{{{n}&{n + 1}}}', f'\\boxed{{{n} \\\\ {n + 1}}}', f'\\boxed{{{n}\\quad {n + 1}}}', f'\\boxed{{{n}\n{n + 1}}}',
        "\\boxed{__import__('os').getpid()}", f'\\boxed{{{n} or maybe {n - 1}}}', f'\\boxed{{maybe {n}, maybe {n - 1}}}',
        f'\\boxed{{less than {n}}}', f'The answer is between {n} and {n + 1}.', f'\\boxed{{between {n} and {n + 1}}}',
        f'\\boxed{{\\not= {n}}}', f'\\boxed{{{n} \\text{{ (or {n + 1})}}}}', f'#### {n}, alternatively {n + 1}',
        f'<answer>either {n - 1} or {n}</answer>', f'Either {n - 1} or {n}.', f'\\boxed{{{n}!}}',
    )  # fmt: skip


AGAINST_SYMBOLS = (
    ('x^2 + 3', 'x'), ('x^2 + 3', 'x^2 + 3 = x^2 + 3 + y'), ('x^2 + 3', 'f(x)'), ('n', 'x'), ('a', 'b'), ('a + b', 'a = b'),
    ('x = 5', 'x = x'), ('x = 5', 'x = 5 \\text{ or } x = 6'), ('x = 5', 'x'), ('y = 2x + 1', 'y = y'), ('y = 2x + 1', 'y'),
    ('y = 2x + 1', '0 = 0'), ('x > 3', 'x \\in \\mathbb{R}'), ('x > 3', 'x > x'), ('(0, 1)', '\\mathbb{R}'), ('(0, 1)', '(a, b)'),
    ('(3, 4)', '(x, y)'), ('(3, 4)', '(x, y) = (x, y)'), ('\\{1, 2\\}', '\\{1, 2, 3, 4\\}'), ('\\{1, 2\\}', '\\{x\\}'),
    ('1, 2', '1, 1, 2, 2'), ('\\emptyset', '\\{0\\}'), ('0', '\\emptyset'), ('10 m', '10 m or 10 cm'),
    ('10 m', '10 \\text{ m} \\text{ cm}'), ('50\\%', '50\\%, 5\\%'), ('\\frac{1}{2}', '\\frac{1}{2}, \\frac{1}{3}'),
    ('\\frac{1}{2}', '\\frac{x}{y}'), ('B', 'A, B, C, D, E'), ('B', 'A or B'), ('B', '(A) (B) (C) (D)'), ('B', 'ABCDE'),
    ('Alice', 'Alice, Bob'), ('Alice', 'Alice or Bob'), ('yes', 'yes and no'), ('yes', 'yes/no'), ('\\sqrt{2}', '\\sqrt{x}'),
    ('\\pi', 'x'), ('e', 'x'), ('i', 'x'), ('2 + 3i', 'a + bi'), ('\\infty', 'x'), ('2^{2009}-1', '2^{2009}'),
    ('f(x) = x + 1', 'f(x) = f(x)'), ('f(x) = x + 1', 'f(x)'),
    ('\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}', '\\begin{pmatrix} x \\\\ y \\end{pmatrix}'),
)  # fmt: skip
