"""Numbers of every kind as answers, drawn with other ways to write them and with other values. See ``tests/unit/answer_pairs.py``."""

from __future__ import annotations

import random
from fractions import Fraction
from math import comb, factorial, isqrt
from typing import NamedTuple

Rng = random.Random


class Drawn(NamedTuple):
    """``right``: other ways to write ``gold``. ``wrong``: other answers."""

    gold: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


def frac(value: Fraction, command: str = "frac") -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"{'-' * (value < 0)}\\{command}{{{abs(value.numerator)}}}{{{value.denominator}}}"


def proper(rng: Rng, low: int = 2, high: int = 40) -> Fraction:
    """A positive number that is no integer."""
    while (value := Fraction(rng.randint(1, 60), rng.randint(low, high))).denominator == 1:
        pass
    return value


def integer(rng: Rng) -> Drawn:
    n = rng.choice((rng.randint(-999, 999), rng.randint(1000, 10**7)))
    right = (f"{n:,}", f"{n}.0", f"{n:,}".replace(",", "{,}"), f"\\frac{{{2 * n}}}{{2}}", f"x = {n}", f"{n - 7} + 7", f"\\mathbf{{{n}}}")
    return Drawn(str(n), right, (str(n + 1), str(-n or 1), f"{n or 1}0", f"{n}.5", f"\\frac{{{n or 1}}}{{2}}", f"{n}!" if n > 2 else "11"))


def thousands(rng: Rng) -> Drawn:
    n = rng.randint(10**4, 10**9)
    right = (f"{n:,}", f"{n:,}".replace(",", " "), f"{n:,}".replace(",", "\\,"), f"{n:,}".replace(",", "{,}"))
    return Drawn(str(n), right, (f"{n + 1000:,}", f"{n // 1000:,}", f"{n * 10:,}", f"{n:,}".replace(",", ", ", 1), f"{n / 10:,.1f}"))


def decimal(rng: Rng) -> Drawn:
    digits = rng.randint(1, 4)
    n = rng.randint(1, 10**5) * 10 + rng.randint(1, 9)
    value = Fraction(n, 10**digits)
    text = f"{n // 10**digits}.{n % 10**digits:0{digits}d}"
    right = (text + "0", frac(value), text.removeprefix("0"), f"{n}/{10**digits}", f"\\text{{{text}}}")
    return Drawn(text, right, (text[:-1] + str(int(text[-1]) % 9 + 1), f"-{text}", frac(value * 10), frac(1 / value), f"1{text}"))


def fraction(rng: Rng) -> Drawn:
    v = proper(rng) * rng.choice((1, -1))
    a, b = v.numerator, v.denominator
    right = (f"{a}/{b}", frac(v, "dfrac"), frac(v, "tfrac"), f"\\frac{{{3 * a}}}{{{3 * b}}}", f"\\frac{{{-a}}}{{{-b}}}", f"{a} \\div {b}")
    wrong = (frac(1 / v), frac(-v), f"{a + b}/{b}", f"{a}/{b + 1}", str(a), f"\\frac{{{a}}}{{{10 * b}}}", f"{float(v):.2g}1")
    return Drawn(frac(v), right, wrong)


def mixed(rng: Rng) -> Drawn:
    b = rng.randint(3, 12)
    whole, a = rng.randint(1, 20), rng.randint(1, b - 1)
    v = whole + Fraction(a, b)
    right = (f"{whole}\\frac{{{a}}}{{{b}}}", frac(v), f"{whole} {a}/{b}", f"{whole} + \\frac{{{a}}}{{{b}}}")
    return Drawn(
        f"{whole} \\frac{{{a}}}{{{b}}}",
        right,
        (f"\\frac{{{whole * a}}}{{{b}}}", frac(v + 1), str(whole), f"{whole} \\frac{{{a}}}{{{b + 1}}}"),
    )


def percent(rng: Rng) -> Drawn:
    n = rng.randint(2, 98)
    right = (f"{n}\\%", f"{n} percent", f"{n}", f"{n / 100}", frac(Fraction(n, 100)), f"{n}.0\\%")
    return Drawn(f"{n}\\%", right, (f"{n + 1}\\%", f"{n}0\\%", f"{n / 10}\\%", f"{n / 1000}", f"-{n}\\%", f"{n + 1}"))


UNITS = (("cm", "centimeters"), ("m", "meters"), ("kg", "kilograms"), ("hours", "hours"), ("miles", "miles"), ("mL", "milliliters"))


def unit(rng: Rng) -> Drawn:
    n, (short, long), (other, _) = rng.randint(2, 500), *rng.sample(UNITS, 2)
    right = (f"{n}\\text{{ {short}}}", f"{n} {long}", f"{n}", f"{n}\\ \\mathrm{{{short}}}", f"{n}.0 {short}")
    wrong = (f"{n}\\text{{ {other}}}", f"{n + 1}\\text{{ {short}}}", f"{n + 1}", f"{n}0\\text{{ {short}}}", f"{n} {other}")
    return Drawn(f"{n} \\text{{ {short}}}", right, wrong)


def currency(rng: Rng) -> Drawn:
    n, cents = rng.randint(2, 5000), rng.randint(1, 99)
    right = (f"\\${n}.{cents:02d}", f"{n}.{cents:02d}", f"{n}.{cents:02d} dollars", f"{n:,}.{cents:02d}")
    return Drawn(
        f"\\${n}.{cents:02d}", right, (f"\\${n}", f"\\${n + 1}.{cents:02d}", f"\\${n}.{cents % 99 + 1:02d}", f"{n}.{cents:02d} cents")
    )


def degrees(rng: Rng) -> Drawn:
    n = rng.randint(1, 359)
    right = (f"{n}", f"{n}\u00b0", f"{n} degrees", f"{n}^{{\\circ}}", f"{n}\\text{{ degrees}}")
    return Drawn(f"{n}^\\circ", right, (f"{n + 1}^\\circ", f"{180 - n if n != 90 else 45}^\\circ", f"{n} radians", f"{n}0^\\circ"))


def surd(rng: Rng) -> Drawn:
    k, m = rng.randint(2, 12), rng.choice((2, 3, 5, 6, 7, 10, 11, 13))
    n = k * k * m
    right = (
        f"\\sqrt{{{n}}}",
        f"{k}\\cdot\\sqrt{m}",
        f"{k}{{\\sqrt{{{m}}}}}",
        f"{k} * sqrt({m})",
        f"{n}^{{1/2}}",
        f"\\frac{{{k * m}}}{{\\sqrt{{{m}}}}}",
        f"{k}\u221a{m}",
    )
    wrong = (
        f"\\sqrt{{{n + 1}}}",
        f"{k + 1}\\sqrt{{{m}}}",
        f"-{k}\\sqrt{{{m}}}",
        f"{k}\\sqrt[3]{{{m}}}",
        f"{m}\\sqrt{{{k}}}" if k != m else "1",
        str(isqrt(n)),
        f"{n}",
    )
    return Drawn(f"{k}\\sqrt{{{m}}}", right, wrong)


def surd_quotient(rng: Rng) -> Drawn:
    a, b, c = rng.randint(1, 15), rng.choice((2, 3, 5, 7, 13)), rng.randint(2, 9)
    right = (
        f"\\frac{{\\sqrt{{{b}}}+{a}}}{{{c}}}",
        f"\\frac{{{a}}}{{{c}}}+\\frac{{\\sqrt{{{b}}}}}{{{c}}}",
        f"({a}+\\sqrt{b})/{c}",
        f"\\frac{{{2 * a}+2\\sqrt{{{b}}}}}{{{2 * c}}}",
    )
    wrong = (
        f"\\frac{{{a}-\\sqrt{{{b}}}}}{{{c}}}",
        f"\\frac{{{a}+\\sqrt{{{b}}}}}{{{c + 1}}}",
        f"{a}+\\frac{{\\sqrt{{{b}}}}}{{{c}}}",
        f"\\frac{{{a} \\pm \\sqrt{{{b}}}}}{{{c}}}",
    )
    return Drawn(f"\\frac{{{a}+\\sqrt{{{b}}}}}{{{c}}}", right, wrong)


def scientific(rng: Rng) -> Drawn:
    n, e = rng.randint(11, 99), rng.randint(3, 8)
    text, value = f"{n // 10}.{n % 10}", n * 10 ** (e - 1)
    right = (
        f"{text} \\cdot 10^{{{e}}}",
        f"{value}",
        f"{value:,}",
        f"{text}e{e}",
        f"{text}\u00d710^{e}",
        f"{n} \\times 10^{{{e - 1}}}",
        f"{text}*10^{e}",
    )
    return Drawn(
        f"{text} \\times 10^{{{e}}}",
        right,
        (f"{text} \\times 10^{{{e + 1}}}", f"{text} \\times 10^{{-{e}}}", f"{value + 1}", text, f"{n} \\times 10^{{{e}}}"),
    )


def tiny(rng: Rng) -> Drawn:
    n, e = rng.randint(2, 9), rng.randint(5, 60)
    right = (f"{n} \\cdot 10^{{-{e}}}", f"\\frac{{{n}}}{{10^{{{e}}}}}", f"{n}/10^{{{e}}}", f"{n}e-{e}")
    return Drawn(
        f"{n} \\times 10^{{-{e}}}", right, (f"{n + 1} \\times 10^{{-{e}}}", "0", f"{n} \\times 10^{{-{e + 1}}}", f"{n} \\times 10^{{{e}}}")
    )


def base(rng: Rng) -> Drawn:
    b = rng.randint(3, 9)
    digits = str(rng.randint(1, b - 1)) + "".join(str(rng.randrange(b)) for _ in range(3))
    other = digits[:-1] + str((int(digits[-1]) + 1) % b)
    return Drawn(
        f"{digits}_{b}",
        (f"{digits}_{{{b}}}", digits, f"{digits}_{{\\text{{{b}}}}}"),
        (f"{other}_{b}", f"{digits}_{b + 1}", f"{digits}0_{b}", other),
    )


def power(rng: Rng) -> Drawn:
    b, e = rng.randint(2, 9), rng.randint(5, 12)
    right = (f"{b}^{{{e}}}", f"{b**e}", f"{b}**{e}", f"{b} \\cdot {b}^{{{e - 1}}}", f"{b**e:,}")
    return Drawn(
        f"{b}^{{{e}}}",
        right,
        (f"{b}^{{{e + 1}}}", f"{e}^{{{b}}}" if b**e != e**b else "1", f"{b**e + 1}", f"{b * e}", f"-{b}^{{{e}}}", f"{b}{e}"),
    )


def logarithm(rng: Rng) -> Drawn:
    b, k = rng.choice((2, 3, 5, 6, 7)), rng.randint(2, 5)
    right = (f"\\ln {b**k}", f"{k}\\ln({b})", f"{k} \\ln{{{b}}}", f"\\ln({b}^{{{k}}})", f"{k}\\log_{{e}} {b}")
    return Drawn(
        f"{k} \\ln {b}",
        right,
        (f"{k} \\ln {b + 1}", f"{k + 1} \\ln {b}", f"\\ln {b * k}" if b * k != b**k else "7", f"\\frac{{\\ln {b}}}{{{k}}}", f"{k * b}"),
    )


def pi_multiple(rng: Rng) -> Drawn:
    v = proper(rng, 2, 12)
    a, b = v.numerator, v.denominator
    right = (
        f"\\frac{{{a}}}{{{b}}}\\pi",
        f"{a}\\pi/{b}",
        f"\\dfrac{{{a}\\pi}}{{{b}}}",
        f"\\frac{{{a}\u03c0}}{{{b}}}",
        f"\\frac{{{2 * a}\\pi}}{{{2 * b}}}",
        f"\\pi \\cdot \\frac{{{a}}}{{{b}}}",
    )
    return Drawn(
        f"\\frac{{{a}\\pi}}{{{b}}}",
        right,
        (
            f"\\frac{{{a}}}{{{b}}}",
            f"\\frac{{{a}}}{{{b}\\pi}}",
            frac(1 / v) + "\\pi",
            f"\\frac{{{a + b}\\pi}}{{{b}}}",
            f"-\\frac{{{a}\\pi}}{{{b}}}",
        ),
    )


def complex_number(rng: Rng) -> Drawn:
    a, b = rng.sample(range(2, 20), 2)
    right = (f"{b}i + {a}", f"{a}+{b} i", f"{a} + i \\cdot {b}", f"i({b} - {a}i)", f"{a}+{b}\\mathrm{{i}}")
    return Drawn(f"{a} + {b}i", right, (f"{a} - {b}i", f"{b} + {a}i", f"{a} + {b}", f"-{a} + {b}i", f"{a} + {b + 1}i", f"{b}i"))


def ratio(rng: Rng) -> Drawn:
    a, b = 2, 1
    while a % b == 0 or b % a == 0 or Fraction(a, b).numerator != a:
        a, b = rng.randint(2, 30), rng.randint(2, 30)
    return Drawn(
        f"{a}:{b}",
        (f"{3 * a}:{3 * b}", f"{a} : {b}", f"\\frac{{{a}}}{{{b}}}", f"{a}/{b}"),
        (f"{b}:{a}", f"{a}:{b + 1}", f"{a + 1}:{b}", f"{a}", f"{a}:{a + b}"),
    )


def counting(rng: Rng) -> Drawn:
    n = rng.randint(6, 14)
    k = rng.randint(2, n // 2 - 1)
    value = comb(n, k)
    right = (f"{value}", f"\\binom{{{n}}}{{{n - k}}}", f"{value:,}", f"\\frac{{{n}!}}{{{k}!\\,{n - k}!}}", f"\\dbinom{{{n}}}{{{k}}}")
    wrong = (
        f"{value + 1}",
        f"\\binom{{{n}}}{{{k + 1}}}" if comb(n, k + 1) != value else "3",
        f"\\binom{{{n + 1}}}{{{k}}}",
        f"{n}!",
        f"\\frac{{{n}!}}{{{k}!}}",
        frac(Fraction(n, k)),
    )
    return Drawn(f"\\binom{{{n}}}{{{k}}}", right, wrong)


def factorials(rng: Rng) -> Drawn:
    n = rng.randint(5, 12)
    right = (f"{factorial(n)}", f"{n} \\cdot {n - 1}!", f"{factorial(n):,}")
    return Drawn(f"{n}!", right, (f"{n + 1}!", f"{n - 1}!", f"{n}", f"{factorial(n) + 1}", f"({n}!)!"))


def repeating(rng: Rng) -> Drawn:
    n = rng.choice([n for n in range(1, 99) if n % 11])
    right = (frac(Fraction(n, 99)), f"0.\\overline{{{n:02d}{n:02d}}}", f"{n}/99")
    return Drawn(
        f"0.\\overline{{{n:02d}}}",
        right,
        (f"0.{n:02d}", frac(Fraction(n, 100)), f"0.\\overline{{{n % 98 + 1:02d}}}", f"0.0\\overline{{{n:02d}}}"),
    )
