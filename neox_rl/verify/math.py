"""Whether a mathematical answer equals the gold answer. Exact and structural first; sympy only for what is left.

Steps: ``extract.final_answer`` of both, ``latex.normalize``, then, until one decides: equal spelling, multiple choice, words, exact
numbers, lists / sets / tuples / intervals / matrices part by part, and ``symbolic.equal``. Must run in a killable process
(``neox_rl.verify.pool``): the last step has no bound of its own.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from itertools import zip_longest
from math import gcd
from typing import Any

from neox_rl.types import Reason
from neox_rl.verify import symbolic
from neox_rl.verify.extract import FUNCTIONS, final_answer, tail
from neox_rl.verify.finding import Finding
from neox_rl.verify.guard import TooLargeError
from neox_rl.verify.latex import Form, Number, form_of, normalize, parse_number, split_top, split_unit
from neox_rl.verify.policy import DEFAULT_POLICY, MathPolicy

MAX_PARTS = 40
MAX_FORM_DEPTH = 6
MAX_NUMBER_DIGITS = 100


def check_math(gold: str, text: str, policy: MathPolicy = DEFAULT_POLICY) -> Finding:
    """MATCH, MISMATCH, NO_ANSWER when ``text`` has no final answer, BAD_GOLD when the gold answer cannot be read."""
    if not readable_gold(gold):
        return Finding(Reason.BAD_GOLD, gold)
    answer = final_answer(text, policy.marked_answers)
    choice = choice_of_gold(gold) if answer or not policy.marked_answers else ""
    if choice and (picked := choice_of_text(text)):
        return Finding(Reason.MATCH if picked == choice else Reason.MISMATCH, picked)
    if not re.search(r"\w|\\", answer):
        return Finding(Reason.NO_ANSWER, answer)
    same = equal(normalize(final_answer(gold)), normalize(answer), policy)
    return Finding(Reason.MATCH if same else Reason.MISMATCH, answer)


@lru_cache(maxsize=4096)
def readable_gold(gold: str) -> bool:
    """Whether a gold answer has a reading of its own: a choice, words, a number, or a formula that parses."""
    answer = normalize(final_answer(gold))
    if choice_of_gold(gold) or is_words(answer) or parse_number(answer):
        return True
    return bool(re.search(r"\w|\\", answer)) and _readable(answer, 0)


def _readable(text: str, depth: int) -> bool:
    text = _value_side(split_unit(_unbracketed(_last_of_chain(text))).text)
    form = form_of(text)
    if form.kind != "leaf" and depth < MAX_FORM_DEPTH:
        return bool(form.parts) and all(is_words(p) or parse_number(p) is not None or _readable(p, depth + 1) for p in form.parts)
    if is_words(text) or parse_number(text) is not None or _NUMERAL.fullmatch(text) or _RATIO.fullmatch(text):
        return True
    try:
        symbolic.parse(form.parts[0])
    except symbolic.UnreadableError as error:
        # What the grammar does not know can still be compared by spelling, except what has no value or no letters.
        return "no value" not in str(error) and bool(re.search(r"[A-Za-z0-9]", text)) and not re.search(r"/\s*0(?![.\d])|\{0\}$", text)
    except TooLargeError:
        return True
    return True


_CHOICE = re.compile(r"(?<![A-Za-z0-9\\'^_{])\(?([A-H])\)?(?![A-Za-z0-9'\u2019^_*+\-=/<>({])(?!\s*[=+\-*/^<>])")
_DENIED = re.compile(r"\b(?:not|rather than|instead of)\s+(?:option\s+)?\(?[A-H]\)?(?![A-Za-z])")
_GOLD_CHOICE = re.compile(r"\(?(?P<a>[A-H])\)?[.:)]?(?:\s+[A-Z][a-z]+\b.*)?|\((?P<b>[A-H])\)\s*\\?\s+[^\s=+\-*/^\\<>].*", re.DOTALL)


def choice_of_gold(gold: str) -> str:
    """The letter of a multiple-choice gold answer (``C``, ``(C)``, ``C Cecile``), else empty."""
    stripped = re.sub(r"\\text(?:bf)?\s*\{([^{}]*)\}|[$]", lambda m: m[1] or "", gold.strip())
    for candidate in (stripped, re.split(r"answer is:?\s*", stripped)[-1]):
        if match := _GOLD_CHOICE.fullmatch(candidate.strip()):
            return str(match["a"] or match["b"])
    return ""


def choice_of_text(text: str) -> str:
    """The letter that a text picks: its final answer's first letter, else the last option letter named in it."""
    answer = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", normalize(final_answer(text)))
    if re.fullmatch(r"[A-Za-z].{0,2}", answer) and not _CHOICE.match(answer):
        return ""
    # "A, B, C, D" names every option and picks none; "C, not A" picks C.
    if len(set(_CHOICE.findall(answer))) > 1 and not re.search(r"[^\W\dA-H_]", re.sub(r"\b(?:and|or)\b", "", answer)):
        return ""
    if match := _CHOICE.match(answer) or _CHOICE.match(tail(text).strip()):
        return match[1]
    if "\\" in answer or "=" in answer or len(answer) > 400:
        return ""
    rest = re.split(r"answer is|answer:|r\u00e9ponse est|\u7b54\u6848", _DENIED.sub("", tail(text)))
    if len(rest) > 1 and (match := _CHOICE.search(rest[-1][:40])):
        return match[1]
    picked = _CHOICE.findall(_DENIED.sub("", tail(text)))
    return picked[-1] if picked and len(tail(text).split()) > 1 else ""


def is_words(text: str) -> bool:
    """Whether an answer is words, not a formula: it has a word of three letters and no digit or operator."""
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    words = re.findall(r"(?<![A-Za-z\\])[A-Za-z]{3,}", plain)
    return bool(words) and not re.search(r"[\d=+*/^<>|\\]", plain) and any(w.lower() not in FUNCTIONS for w in words)


def _words_key(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"\\text|\\[,; ]", " ", text).lower())


def _spelling(text: str) -> str:
    """Without what never changes the meaning: spaces, text commands, braces around one character, signs of multiplication by a letter."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"\\cdot(?![a-zA-Z])", "*", text))
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", re.sub(r"\*(?=[\\A-Za-z(])", "", text))


def equal(gold: str, pred: str, policy: MathPolicy, depth: int = 0) -> bool:
    """Whether two normalized answers are equal."""
    if not pred or depth > MAX_FORM_DEPTH:
        return False
    if _spelling(gold) == _spelling(pred):
        return True
    if is_words(gold):
        return _words_key(gold) == _words_key(pred)
    gold, pred = _last_of_chain(gold), _last_of_chain(pred)
    gold, pred = _same_side(gold, pred)
    gold_q, pred_q = split_unit(_unbracketed(gold)), split_unit(_unbracketed(pred))
    if policy.units_must_match and gold_q.unit and pred_q.unit and gold_q.unit != pred_q.unit:
        return False
    gold, pred = gold_q.text, pred_q.text
    if _RATIO.fullmatch(gold):
        return _ratio(gold) == (_ratio(pred) if _RATIO.fullmatch(pred) else _ratio_of_number(pred))
    if (numbers := _equal_numbers(gold, pred, policy)) is not None:
        return numbers
    forms = form_of(gold), form_of(pred)
    if (parts := _equal_forms(*forms, policy, depth)) is not None:
        return parts
    return _equal_leaves(_outer(forms[0], gold), _outer(forms[1], pred), policy)


def _outer(form: Form, text: str) -> str:
    return form.parts[0] if form.kind == "leaf" else text


def _unbracketed(text: str) -> str:
    """``[45 degrees]``, ``(5)`` and ``{5}`` without their brackets."""
    form = form_of(text)
    return form.parts[0] if form.kind == "leaf" and text.startswith(("[", "(", "{")) and text.endswith(("]", ")", "}")) else text


_SYMBOLS_ONLY = re.compile(r"(?:\\(?:angle|triangle|text|frac|operatorname|overline|vec|[a-zA-Z]+)|[A-Za-z]|[(){}\[\],:/'|\s])+")
_RELATION = re.compile(r"[<>]|\\(?:leq|geq|neq)")
_SUBSCRIPT = re.compile(r"_(?:\{[^{}]*\}|\w)")


def _assigned(text: str) -> tuple[str, str] | None:
    r"""``name = value`` or ``name \in value`` as (name, value); None where the left side is more than names."""
    match = re.fullmatch(r"([^=<>]+?)\s*(?:=|\\in(?![a-z]))\s*([^=<>]+)", text, re.DOTALL)
    if not match or "\\leq" in text or "\\geq" in text or "\\neq" in text or ("\\frac" in match[1] and re.search(r"\d", match[1])):
        return None
    name = _SUBSCRIPT.sub("", match[1]).strip()
    if ("," in name and not name.startswith("(")) or not _SYMBOLS_ONLY.fullmatch(re.sub(r"[A-Za-z]\(\d+\)", "f", name)):
        return None
    return re.sub(r"\s", "", match[1]), match[2].strip()


def _value_side(text: str) -> str:
    pair = _assigned(text)
    return pair[1] if pair else text


def _sides(text: str) -> list[str]:
    """The sides of ``a = b = c``; the equals signs inside ``\\sum_{i=1}`` and other braces are no part of it."""
    return split_top(text, "=")


def _last_of_chain(text: str) -> str:
    """``x = a = b`` is ``x = b``; lists and inequalities stay."""
    sides = _sides(text)
    if len(sides) > 2 and not re.search(r"[,;<>]|\\(?:leq|geq|neq)", text):
        return f"{sides[0]} = {sides[-1]}" if re.fullmatch(r"[A-Za-z](?:\([a-z]\))?", sides[0]) else sides[-1]
    return text


def _same_side(gold: str, pred: str) -> tuple[str, str]:
    """Drops ``x =`` where only one side has it, or both name the same thing (a function whatever its argument)."""
    a, b = _assigned(gold), _assigned(pred)
    gold_is_formula, pred_is_formula = (len(_sides(text)) == 1 and not _RELATION.search(text) for text in (gold, pred))
    if a and b:
        heads = [re.sub(r"\([a-z]\)$", "()", name) for name, _ in (a, b)]
        return (a[1], b[1]) if heads[0] == heads[1] else (gold, pred)
    if a and pred_is_formula:
        return a[1], pred
    if b and (gold_is_formula or b[0].startswith("(")):
        return gold, b[1]
    # "m + n = 7" says 7, as the end of any computation does, for a gold answer that is no equation itself.
    if gold_is_formula and len(_sides(pred)) > 1 and not re.search(r"[,;]", pred) and not _RELATION.search(pred):
        return gold, _sides(pred)[-1]
    return gold, pred


_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+")
_NUMERAL = re.compile(r"(-?[0-9A-Za-z]+)_\{?(?:\\text\{)?(\w+)\}?\}?")


def _ratio(text: str) -> tuple[int, ...]:
    """``14:64`` as (7, 32); a time such as ``12:00`` stays as it is."""
    parts = tuple(int(part[:MAX_NUMBER_DIGITS]) for part in text.split(":"))
    divisor = gcd(*parts) if all(parts) else 1
    return tuple(part // divisor for part in parts)


def _ratio_of_number(text: str) -> tuple[int, ...]:
    """A fraction as the ratio of its two numbers; empty when it is no number."""
    number = parse_number(text)
    return (number.value.numerator, number.value.denominator) if number else ()


_PERCENT = re.compile(r"(?P<number>.*?)\s*\\%")


def _equal_numbers(gold: str, pred: str, policy: MathPolicy) -> bool | None:
    """Exact comparison where both are plain numbers; None where either is not."""
    if (a := _NUMERAL.fullmatch(gold.replace(" ", ""))) and a[1].isalnum() and a[1][:1].isdigit():
        b = _NUMERAL.fullmatch(pred.replace(" ", ""))
        return (a[1], a[2]) == (b[1], b[2]) if b else a[1] == pred
    gold_percent, pred_percent = _PERCENT.fullmatch(gold), _PERCENT.fullmatch(pred)
    x = parse_number(gold_percent["number"] if gold_percent else gold)
    y = parse_number(pred_percent["number"] if pred_percent else pred)
    if x is None or y is None:
        return _decimal_comma(gold, pred)
    if policy.reduced_fractions and _unreduced(pred):
        return False
    if gold_percent and pred_percent:
        return _same_number(x, y, policy)
    if gold_percent or pred_percent:
        scaled = (Number(x.value / 100, -1), y) if gold_percent else (x, Number(y.value / 100, -1))
        return _same_number(*scaled, policy) or (policy.percent_sign_optional and _same_number(x, y, policy))
    same = _same_number(x, y, policy)
    # "7:32" and "14:64" are the same ratio; "1,22" was read as a list of two above this point.
    return same or bool(_decimal_comma(gold, pred))


_COMMA = re.compile(r"-?\d+,\d{1,2}|-?\d+,\d{4,}|-?0,\d+")


def _decimal_comma(gold: str, pred: str) -> bool | None:
    """Whether ``1,22`` and ``1.22`` are one number in two conventions; None when it does not arise."""
    for comma, point in ((gold, pred), (pred, gold)):
        if _COMMA.fullmatch(comma) and (number := parse_number(point)) and "." in point:
            return number.value == Fraction(comma.replace(",", "."))
    return None


def _same_number(x: Number, y: Number, policy: MathPolicy) -> bool:
    if x.value == y.value:
        return True
    return any(_rounds(exact.value, shown, policy) for exact, shown in ((x, y), (y, x)))


def _rounds(exact: Fraction, shown: Number, policy: MathPolicy) -> bool:
    """Whether the decimal ``shown`` is ``exact`` rounded (or cut) to the digits it shows, enough of them, and no integer."""
    if shown.decimals < 1 or exact.denominator == 1:
        return False
    digits = len(str(abs(shown.value.numerator * 10**shown.decimals // shown.value.denominator)))
    if digits < policy.rounded_digits and not (shown.decimals >= policy.rounded_digits and digits >= policy.rounded_digits - 1):
        return False
    scaled, ulp = exact * 10**shown.decimals, shown.value * 10**shown.decimals
    if abs(scaled - ulp) <= Fraction(1, 2):
        return True
    return bool(abs(scaled) >= abs(ulp) and abs(scaled - ulp) < 1)


def _unreduced(text: str) -> bool:
    match = re.fullmatch(r"-?(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))", text.replace(" ", ""))
    if not match:
        return False
    over, under = (int(g) for g in match.groups() if g)
    return under == 0 or Fraction(over, under).denominator != under


def _equal_forms(a: Form, b: Form, policy: MathPolicy, depth: int) -> bool | None:
    """Part by part where the two forms can be compared; None where sympy should look at the whole."""
    if a.kind == "leaf" and b.kind == "leaf":
        return None
    if "leaf" in (a.kind, b.kind):
        whole, leaf = (a, b) if b.kind == "leaf" else (b, a)
        if whole.kind in ("set", "list", "braces") and len(whole.parts) == 1:
            return equal(a.parts[0], b.parts[0], policy, depth + 1)
        if whole.kind == "list" and "\\cup" in leaf.parts[0] and all(_RELATION.search(part) for part in whole.parts):
            pieces = [tuple(f.parts[0].split("\\cup")) if f is leaf else f.parts for f in (a, b)]
            return _same_elements(pieces[0], pieces[1], policy, depth) if len(pieces[0]) == len(pieces[1]) else False
        # A tuple or an interval may equal a union, an inequality or a vector; a list or a matrix equals no single formula.
        symbolic_leaf = re.search(r"[<>]|\\(?:leq|geq|cup|cap|in|setminus|begin|mathbb)", leaf.parts[0])
        return None if symbolic_leaf else False
    if len(a.parts) != len(b.parts) or len(a.parts) > MAX_PARTS:
        return _expanded(a, b, policy, depth)
    unordered = {"list", "set", "braces"}
    if a.kind in unordered and b.kind in unordered:
        if _keeps_order(a, policy) and b.kind != "set":
            return _all_equal(a.parts, b.parts, policy, depth)
        return _same_elements(a.parts, b.parts, policy, depth)
    if a.kind == b.kind:
        return a.columns == b.columns and _all_equal(a.parts, b.parts, policy, depth)
    vector = {"matrix", "()", "[]"}
    if {a.kind, b.kind} <= vector and "matrix" in (a.kind, b.kind):
        rows_or_one = [f.columns in (1, len(f.parts)) for f in (a, b) if f.kind == "matrix"]
        return all(rows_or_one) and _all_equal(a.parts, b.parts, policy, depth)
    # (1, 3) against 1, 3 or {1,3}: one of them only lost its brackets.
    if {a.kind, b.kind} in ({"()", "list"}, {"()", "braces"}):
        return _all_equal(a.parts, b.parts, policy, depth)
    return False


def _keeps_order(gold: Form, policy: MathPolicy) -> bool:
    """Whether a bare list answers several questions one by one. A set of solutions is written in order of size, or as 1, -1, 7, -7."""
    if gold.kind != "list" or policy.ordered_lists != "unsorted":
        return gold.kind == "list" and policy.ordered_lists == "always"
    numbers = [parse_number(part) for part in gold.parts]
    values = [number.value for number in numbers if number]
    ordered = any(values in (sorted(values, key=key), sorted(values, key=key, reverse=True)) for key in (Fraction, abs))
    return len(values) == len(numbers) > 2 and not ordered


def _expanded(a: Form, b: Form, policy: MathPolicy, depth: int) -> bool:
    r"""Lists of different lengths are equal only where ``\pm`` stands for two elements."""
    if not {a.kind, b.kind} <= {"list", "set", "braces"}:
        return False
    left, right = (tuple(part for p in form.parts for part in _both_signs(p)) for form in (a, b))
    return len(left) == len(right) <= MAX_PARTS and _same_elements(left, right, policy, depth)


def _both_signs(part: str) -> tuple[str, ...]:
    form = form_of(_value_side(part)) if "\\pm" in part else None
    return form.parts if form and form.kind == "list" else (part,)


def _all_equal(a: tuple[str, ...], b: tuple[str, ...], policy: MathPolicy, depth: int) -> bool:
    return all(x is not None and y is not None and equal(x, y, policy, depth + 1) for x, y in zip_longest(a, b))


def _same_elements(a: tuple[str, ...], b: tuple[str, ...], policy: MathPolicy, depth: int) -> bool:
    left = list(b)
    for x in a:
        found = next((y for y in left if equal(x, y, policy, depth + 1)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _equal_leaves(gold: str, pred: str, policy: MathPolicy) -> bool:
    """The last step: sympy. A single letter or a name equals only itself."""
    if re.fullmatch(r"[A-Za-z]'*|\\[A-Za-z]+", gold) and re.fullmatch(r"[A-Za-z]'*", pred):
        return gold == pred or (not policy.case_sensitive and gold.lower() == pred.lower())
    if not policy.case_sensitive:
        gold, pred = gold.lower(), pred.lower()
    # math-verify takes the right side of any equation between symbols for its value: x + y = 1 is not 1.
    is_relation = re.search(r"[<>]|\\(?:leq|geq|neq|in(?![a-z]))", gold + pred)
    if ("'" in gold) != ("'" in pred) or ((len(_sides(gold)) > 1) != (len(_sides(pred)) > 1) and not is_relation):
        return False
    try:
        if (rounded := _rounded_leaf(gold, pred, policy)) is not None:
            return rounded
        return symbolic.equal(gold, pred, policy.interval_as_inequality)
    except (symbolic.UnreadableError, TooLargeError):
        return False


def _rounded_leaf(gold: str, pred: str, policy: MathPolicy) -> bool | None:
    """A decimal against a closed formula: its value rounded; None where neither is a decimal literal."""
    for formula, literal in ((gold, pred), (pred, gold)):
        shown = parse_number(literal)
        if shown is None or shown.decimals < 1:
            continue
        number = symbolic.value(symbolic.parse(formula)) if formula == gold else _quiet_value(formula)
        if number is None or not number.is_real:
            return False if number is not None else None
        exact = Fraction(str(number))
        return abs(exact - shown.value) < abs(exact) / 10**25 or _rounds(exact, shown, policy)
    return None


def _quiet_value(formula: str) -> Any:
    try:
        return symbolic.value(symbolic.parse(formula))
    except symbolic.UnreadableError:
        return None
