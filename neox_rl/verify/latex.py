r"""One spelling of an answer, and its outer form: list, set, tuple, interval, matrix or leaf. Pure, no sympy.

Normalizing keeps the meaning: it only removes what LaTeX and people write in several ways (``\dfrac``, ``\left(``, the sign
U+00D7, full-width digits, thousands separators, units, ``\frac13``).
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

_UNICODE = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": r"\cdot ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u2217": "*",
        "\u00f7": "/", "\u2215": "/", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2264": r"\leq ", "\u2265": r"\geq ",
        "\u2260": r"\neq ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u00b0": r"^\circ", "\u00b1": r"\pm ",
        "\u2205": r"\emptyset ", "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "\u2115": r"\mathbb{N}",
        "\u211a": r"\mathbb{Q}", "\u03b8": r"\theta ", "\u03b1": r"\alpha ", "\u03b2": r"\beta ", "\u2248": r"\approx ",
        "\u200b": "", "\ufeff": "", "\u2061": "", "\u2032": "'", "\u2019": "'", "\u3002": ".", "\u20ac": "", "\u00a3": "",
        "\u00a5": "",
    }
)  # fmt: skip
_SUPERSCRIPTS = dict(zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789", strict=True))
_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_VULGAR = re.compile(r"(\d+)\u2044(\d+)")

_REPLACED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|biggl|biggr|bigg|Bigg|middle)(?![a-zA-Z])\.?", ""),
        (r"\\\{\s*\\\}", r"\\emptyset "),
        (r"^\\text\s*\{([^{}]*\d[^{}]*)\}$", r"\1"),
        (r"(?<=\d)\s*(?:\\text\s*\{\s*million\s*\}|million)$", r" \\cdot 10^{6}"),
        (r"(?<=\d)\s*(?:\\text\s*\{\s*billion\s*\}|billion)$", r" \\cdot 10^{9}"),
        (r"\\pmod\s*(\w)", r"\\pmod{\1}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        # Money is a unit: \\$5 is not 5 cents.
        (r"^\s*\\[$]\s*(\d[\d,]*(?:\.\d+)?)\s*$", r"\1 dollars"),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it)(?![a-zA-Z])", ""),
        (r"\\(?:dfrac|tfrac|cfrac)(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:dbinom|tbinom)(?![a-zA-Z])", r"\\binom"),
        (r"(?<!\\)\\!\s*|\{\s*\}", ""),
        (r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ""),
        (r"\{,\}\s*", ","),
        (r"(?<!\\)\\[,;:> ]|~|\\(?:quad|qquad|hspace\{[^{}]*\}|phantom\{[^{}]*\})(?![a-zA-Z])", " "),
        (r"\\(?:textbf|textit|textrm|textnormal|textsf|mbox|hbox)(?=\s*\{)", r"\\text"),
        (r"\\(?:mathbf|mathit|mathcal|mathsf|boldsymbol|bm|operatorname|overline|hat)\s*\{\s*([A-Za-z])\s*\}", r"\1"),
        # A letter in roman type is the constant e or i, a label, or after a number a unit.
        (r"\\(?:mathrm|text)\s*\{\s*([ei])\s*\}", r"\1"),
        (r"(?<![\d})])(?<![\d})] )\\(?:mathrm|text)\s*\{\s*([A-Za-z])\s*\}", r"\1"),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|operatorname)(?=\s*\{)", r"\\text"),
        (r"\\operatorname\*?", r"\\text"),
        (r"\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}", ", "),
        (r"(?<![A-Za-z\\]),?\s*(?:and|or)(?![a-z])", ", "),
        (r"\\(?:lt|less)(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"<=|\\(?:le|leqslant|leqq)(?![a-zA-Z])", r"\\leq "),
        (r">=|\\(?:ge|geqslant|geqq)(?![a-zA-Z])", r"\\geq "),
        (r"!=|\\not\s*=|\\ne(?![a-zA-Z])", r"\\neq "),
        (r"\\(?:varnothing)(?![a-zA-Z])", r"\\emptyset "),
        (r"\\(?:lbrace|lbrack)(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\times(?![a-zA-Z])", r"\\cdot "),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\\[$]|[$]|\\(?:EUR|euro|pounds)(?![a-zA-Z])", ""),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])|\\textdegree", r"^\\circ"),
        (r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])", "^"),
        (r"(?<![\\A-Za-z])(sqrt|pi|infty|sin|cos|tan|log|ln|frac)(?![A-Za-z])", r"\\\1"),
        (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\d+)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*([A-Za-z])", r"\\sqrt{\1}"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\^\s*(-?\d{2,}|-\d)", r"^{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"\^\s*(\\frac\{[^{}]*\}\{[^{}]*\})", r"^{\1}"),
        (r"\\%|%|\\text\{\s*(?:percent|percentage|pct)\s*\}|(?<![A-Za-z\\])(?:percent|percentage|pct)(?![A-Za-z])", r"\\%"),
        (r"(?<![A-Za-z\d.])\.(?=\d)", "0."),
        (r"\\(?:ldots|dots|cdots)(?![a-zA-Z])", r"\\ldots "),
        (r"\\mid(?![a-zA-Z])|\\vert(?![a-zA-Z])|\\lvert(?![a-zA-Z])|\\rvert(?![a-zA-Z])", "|"),
        (r"\\begin\{[bB]matrix\}", r"\\begin{pmatrix}"),
        (r"\\end\{[bB]matrix\}", r"\\end{pmatrix}"),
    )
)
_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z({\[)}\]])")
_SPACES = re.compile(r"\s+")
_APPROX = re.compile(r"\\(?:approx|simeq)(?![a-zA-Z])|~=")
_MIXED = re.compile(r"(?<![\d.}^_\w])(\d{1,9})\s*(?:\\frac\s*\{(\d{1,9})\}\s*\{(\d{1,9})\}|\s(\d{1,9})/(\d{1,9}))(?![\d.])")


def normalize(text: str) -> str:
    """One spelling of a formula, whitespace collapsed, in particular of the symbols outside ASCII."""
    text = _SUPERSCRIPT.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text.translate(_UNICODE))
    text = _VULGAR.sub(r"\\frac{\1}{\2}", unicodedata.normalize("NFKC", text).translate(_UNICODE))
    text = re.sub("\u221a\\s*(\\w+|\\([^()]*\\))", r"\\sqrt{\1}", text)
    if "matrix" not in text and "cases" not in text:
        text = _DOUBLED.sub(r"\\", text)
    for pattern, new in _REPLACED:
        text = pattern.sub(new, text)
    text = _APPROX.split(text)[0] or text
    text = _MIXED.sub(_mixed, _SPACES.sub(" ", text))
    text = text.lstrip(" ,;:=\"'").rstrip(' .,;:"')
    return text[:-1].rstrip() if text.endswith("\\") else text


def _mixed(match: re.Match[str]) -> str:
    r"""``1 \frac58`` is a mixed number; ``3 \frac42`` a product."""
    whole, *rest = match.groups()
    over, under = (part for part in rest if part is not None)
    return rf"({whole}+\frac{{{over}}}{{{under}}})" if int(over) < int(under) else rf"({whole}\cdot \frac{{{over}}}{{{under}}})"


_UNIT_WORDS = {
    "m": "meter meters metre metres", "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters millimetres", "km": "kilometer kilometers kilometre kilometres", "in": "inch inches",
    "ft": "foot feet", "yd": "yard yards", "mi": "mile miles", "g": "gram grams", "kg": "kilogram kilograms",
    "mg": "milligram milligrams", "lb": "pound pounds lbs", "oz": "ounce ounces", "s": "sec second seconds secs",
    "min": "minute minutes mins", "h": "hr hour hours hrs", "day": "days", "week": "weeks", "month": "months",
    "year": "years yr yrs", "l": "liter liters litre litres", "ml": "milliliter milliliters", "deg": "degree degrees",
    "rad": "radian radians", "dollar": "dollars usd", "cent": "cents", "euro": "euros", "mph": "", "am": "a.m", "pm": "p.m",
    "kmh": "km/h kph", "ms": "m/s", "unit": "units", "n": "newton newtons", "j": "joule joules",
}  # fmt: skip
_UNITS = {word: unit for unit, words in _UNIT_WORDS.items() for word in (unit, *words.split())}
_TEXT_END = re.compile(r"(?P<head>.*[\d})\]\w%])\s*\\text\s*\{(?P<unit>[^{}]*)\}\s*(?P<power>\^\s*\{?\s*\d\s*\}?)?$", re.DOTALL)
_WORD_END = re.compile(
    r"(?P<head>.*[\d})\]])\s*(?P<unit>(?:sq(?:uare)?\.? |cubic )?[A-Za-z]{1,12}(?:/[a-z]{1,6})?|[A-Za-z]{3,20}(?: [A-Za-z]{2,20}){1,5})\s*"
    r"(?P<power>\^\s*\{?\s*[23]\s*\}?)?$",
    re.DOTALL,
)
_LETTER_END = re.compile(r"(?P<head>-?\d[\d,.]*) (?:\\text\s*\{\s*)?(?P<unit>[mgshlL])\s*\}?")
_DEGREES_END = re.compile(r"(?P<head>.*[\d}])\s*\^\\circ\s*(?:\\text\{)?\s*[CF]?\s*\}?$", re.DOTALL)


class Quantity(NamedTuple):
    """An answer without its unit; ``unit`` is its canonical name, or the words as they stand, empty without one."""

    text: str
    unit: str


def split_unit(text: str) -> Quantity:
    r"""``10\text{ cm}^2`` is ``10`` in ``cm^2``. A letter is a variable, except for m, g, s, h and l apart from a plain number."""
    if match := _LETTER_END.fullmatch(text):
        return Quantity(match["head"], _UNITS[match["unit"].lower()])
    degrees = _DEGREES_END.match(text)
    if degrees and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return Quantity(degrees["head"].strip(), "deg")
    match, quoted = _TEXT_END.match(text), True
    if not match:
        match, quoted = _WORD_END.match(text), False
    if not match:
        return Quantity(text, "")
    words = match["unit"].strip(" .").lower()
    if re.search(r"\d", words):
        return Quantity(text, "")
    known = _UNITS.get(words) or _UNITS.get(words.removeprefix("square ").removeprefix("sq ").removeprefix("cubic "))
    if quoted and len(words) == 1 and known is None:
        return Quantity(text, "")
    if not quoted and (len(words) < 2 or (known is None and (len(words) < 4 or words in ("sqrt", "frac")))):
        return Quantity(text, "")
    power = re.sub(r"[^\d]", "", match["power"] or "")
    power = power or ("2" if words.startswith("sq") else "3" if words.startswith("cubic ") else "")
    return Quantity(match["head"].strip().rstrip("\\ "), (known or words) + (f"^{power}" if power and known else ""))


_INT = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_DECIMAL = re.compile(rf"(-?)\s*({_INT}(?:\.\d*)?|\.\d+)")
_FRACTION = re.compile(rf"(-?)\s*(?:\\frac\s*\{{\s*(-?)\s*({_INT})\s*\}}\s*\{{\s*(-?)\s*({_INT})\s*\}}|({_INT})\s*/\s*(-?)\s*({_INT}))")
_MIXED_SUM = re.compile(r"(-?)\s*\((\d+)\+\\frac\{(\d+)\}\{(\d+)\}\)")
_SCIENTIFIC = re.compile(
    rf"(-?\s*{_INT}(?:\.\d+)?)\s*(?:\\cdot|\*)\s*10\s*\^\s*\{{?\s*(-?\d{{1,3}})\s*\}}?|(-?\d+(?:\.\d+)?)[eE]([-+]?\d{{1,3}})"
)
_REPEATING = re.compile(r"(-?)\s*(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
MAX_DIGITS = 4000


class Number(NamedTuple):
    """An exact number as it was written: ``decimals`` digits after the point, -1 when it is no decimal literal."""

    value: Fraction
    decimals: int


def parse_number(text: str) -> Number | None:
    """The value of an integer, decimal, fraction, mixed number, repeating or scientific decimal; None for all else."""
    text = text.strip()
    while text.startswith(("(", "{")) and text.endswith((")", "}")) and _MIXED_SUM.fullmatch(text) is None:
        text = text[1:-1].strip()
    text = text.removeprefix("+").strip()
    if len(text) > MAX_DIGITS or not re.search(r"[0-9]", text) or not text.isascii():
        return None
    if match := _DECIMAL.fullmatch(text):
        digits = re.sub(r"[ ,]", "", match[2]).rstrip(".")
        return Number(_signed(match[1], Fraction(digits)), len(digits.partition(".")[2]))
    if match := _FRACTION.fullmatch(text):
        sign = match[1] + (match[2] or "") + (match[4] or "") + (match[7] or "")
        over, under = (int(re.sub(r"[ ,]", "", part)) for part in ((match[3] or match[6]), (match[5] or match[8])))
        return Number(_signed("-" * (sign.count("-") % 2), Fraction(over, under)), -1) if under else None
    if match := _MIXED_SUM.fullmatch(text):
        return Number(_signed(match[1], int(match[2]) + Fraction(int(match[3]), int(match[4]))), -1) if int(match[4]) else None
    if match := _SCIENTIFIC.fullmatch(text):
        mantissa, exponent = (match[1], match[2]) if match[1] else (match[3], match[4])
        return Number(Fraction(re.sub(r"[ ,]", "", mantissa)) * Fraction(10) ** int(exponent), -1)
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, cycle = match.groups()
        scale = 10 ** len(fixed)
        value = Fraction(int(whole + fixed or "0"), scale) + Fraction(int(cycle), (10 ** len(cycle) - 1) * scale)
        return Number(_signed(sign, value), -1)
    return None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign else value


class Form(NamedTuple):
    """The outer form of an answer. ``kind``: leaf, list, set, matrix, or the two brackets of a tuple or interval."""

    kind: str
    parts: tuple[str, ...]
    columns: int = 0


_GRID = r"\{(?:pmatrix|matrix|array)\}"
_MATRIX = re.compile(rf"\(?\s*\\begin{_GRID}(?:\{{[lcr| ]*\}})?(?P<body>.*)\\end{_GRID}\s*\)?", re.DOTALL)
_BRACKETS = (
    (r"\{", r"\}", "set"),
    ("{", "}", "braces"),
    ("(", ")", "()"),
    ("[", "]", "[]"),
    ("(", "]", "(]"),
    ("[", ")", "[)"),
)
_PM = re.compile(r"\\pm(?![a-zA-Z])|\+-|\+/-")


def form_of(text: str) -> Form:
    """Splits off the outermost list, set, tuple, interval or matrix; a leaf has itself as its only part."""
    text = text.strip()
    if (match := _MATRIX.fullmatch(text)) and "\\begin" not in match["body"]:
        rows = [row.split("&") for row in re.split(r"\\\\", match["body"]) if row.strip()]
        widths = {len(row) for row in rows}
        cells = tuple(cell.strip() for row in rows for cell in row)
        return Form("matrix", cells, widths.pop()) if len(widths) == 1 else Form("leaf", (text,))
    for separator in (";", ","):
        parts = split_top(text, separator)
        if len(parts) > 1 and not _DECIMAL.fullmatch(text):
            return Form("list", tuple(parts))
    for opening, closing, kind in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing) and _encloses(text, len(opening)):
            inner = text[len(opening) : len(text) - len(closing)]
            parts = split_top(inner, ";") if ";" in inner else split_top(inner, ",")
            if len(parts) > 1 or kind == "set":
                return Form(kind, tuple(parts)) if "\\mid" not in inner and ":" not in inner and "|" not in inner else Form("leaf", (text,))
            return form_of(inner) if inner.strip() and kind in ("()", "[]", "braces") else Form("leaf", (text,))
    if len(_PM.findall(text)) == 1 and not text.startswith("+-") and not re.search(r"[<>=]|\\(?:leq|geq|neq)", text):
        return Form("list", (_PM.sub("+", text).removeprefix("+").strip(), _PM.sub("-", text)))
    return Form("leaf", (text,))


def split_top(text: str, separator: str) -> list[str]:
    """The parts between separators outside all brackets; the whole text when its brackets do not close."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    parts = [part.strip() for part in parts]
    return [part for part in parts if part] if depth == 0 else [text]


def _encloses(text: str, skip: int) -> bool:
    """Whether the bracket that opens the text closes at its end."""
    depth = 1
    for i in range(skip, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False
